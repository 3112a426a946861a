"""Choose which attached adapters a model uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import StateError, listing
from ..layers import saved
from ..layers.layer import child_name
from .state import STATE, State, attached_of, check_not_routed, layers_of, names_of, qualified_name, state_of


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Use one adapter, a weighted sum of several (`{"sql": 0.7, "style": 0.3}`), or None for the base alone.

    Raises StateError for an unknown name, a weight that is not finite, while an adapter is merged, inside `route`, and
    when an adapter with saved weights would be scaled, or mixed with another one that replaces the same weights.
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
    check_saved(state, weights)
    set_active(model, state, weights)


def check_saved(state: State, weights: Mapping[str, float], where: str = "") -> None:
    """Raise StateError if an adapter with saved weights would be scaled, or two of them replace the same weight.

    `where`: added to the adapter's name in the message.
    """
    owners: dict[str, str] = {}
    for name, weight in weights.items():
        own = state.adapters[name].saved
        if own and weight != 1.0:
            raise StateError(
                f"adapter '{name}'{where} replaces weights of the base ({listing(own, 3)}), which cannot be scaled "
                f"(its weight is {weight:g})\n"
                "  use it with weight 1"
            )
        both = [full for full in own if full in owners]
        if both:
            raise StateError(
                f"adapter '{owners[both[0]]}' replaces weights of the base ({listing(both, 3)}), and so does '{name}'"
                f"{where}: they cannot be mixed\n"
                "  use one of the two; adapters that replace different weights can be used together"
            )
        owners |= dict.fromkeys(own, name)


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
    use_saved(model, state, weights)


def use_saved(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Switch to these adapters' saved weights, and to the base's where they have none."""
    if any(attached.saved for attached in state.adapters.values()):  # most have none: skip the walk over all modules
        saved.use(model, [n for n in names if state.adapters[n].saved])
