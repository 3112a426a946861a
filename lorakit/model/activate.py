"""Choose which attached adapters a model uses."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from ..errors import StateError, listing
from ..layers import saved
from ..layers.layer import child_name
from .state import STATE, State, attached_of, check_not_routed, layers_of, names_of, qualified_name, state_of


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Use one adapter, a weighted sum of several (`{"sql": 0.7, "style": 0.3}`), or None for the base alone.

    Raises StateError for an unknown name, a weight that is not finite, while an adapter is merged, inside `route`, and
    when an adapter with saved weights would be scaled or mixed with another one.
    """
    state = state_of(model)
    check_not_routed(state, "activate")
    if not isinstance(which, str | Mapping | None):
        raise StateError(
            f"activate(model, which): got a {qualified_name(which)}\n"
            f"  expected a name, None, or names with weights such as {{'a': 0.7, 'b': 0.3}}"
        )
    weights = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in weights.items():
        attached_of(state, name)
        if not (isinstance(weight, int | float) and math.isfinite(weight)):
            raise StateError(f"the weight of adapter '{name}' is {weight!r}; expected a finite number")
    if state.merged is not None:
        raise StateError(
            f"{names_of(state.merged)} is merged into the base\n  call lorakit.unmerge(model) before activating another"
        )
    with_saved = [n for n in weights if state.adapters[n].saved]
    if len(with_saved) > 1 or (with_saved and weights[with_saved[0]] != 1.0):
        raise StateError(
            f"adapter '{with_saved[0]}' replaces weights of the base "
            f"({listing(state.adapters[with_saved[0]].saved, 3)}), which cannot be mixed or scaled\n"
            "  activate it with weight 1, alone or with adapters that have no saved weights"
        )
    set_active(model, state, weights)


def active(model: nn.Module) -> dict[str, float]:
    """Return the active adapters and their weights; empty for the base alone. Raises StateError if none is attached."""
    return dict(state_of(model).active)


def adapters(model: nn.Module) -> list[str]:
    """Return the names of the attached adapters; empty if there are none."""
    state = model.__dict__.get(STATE)
    return list(state.adapters) if state else []


def set_active(model: nn.Module, state: State, weights: dict[str, float]) -> None:
    """Set every layer's active updates, and the saved weights of the adapter that has some. `weights` is checked."""
    state.active = weights
    children = [(child_name(n), w) for n, w in weights.items()]
    for _, layer in layers_of(model):
        layer.lora_active = tuple((child, w) for child, w in children if child in layer._modules)
    use_saved(model, state, next((n for n in weights if state.adapters[n].saved), None))


def use_saved(model: nn.Module, state: State, name: str | None) -> None:
    """Switch to an adapter's saved weights, or back to the base's (None)."""
    if any(attached.saved for attached in state.adapters.values()):  # most have none: skip the walk over all modules
        saved.use(model, name)
