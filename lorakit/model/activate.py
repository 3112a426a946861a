"""Which of the attached adapters a model computes with."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from ..errors import StateError, listing
from ..layers import saved
from ..layers.layer import child_name
from .state import STATE, State, attached_of, check_not_routed, layers_of, names_of, qualified_name, state_of


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Choose what the model computes with: one adapter, several with weights (their updates are summed), or None, the
    base alone.
    """
    state = state_of(model)
    check_not_routed(state, "activate")
    if not isinstance(which, str | Mapping | None):
        raise StateError(
            f"activate(model, which): got a {qualified_name(which)}\n"
            f"  expected a name, None, or names with weights such as {{'a': 0.7, 'b': 0.3}}"
        )
    wanted = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in wanted.items():
        attached_of(state, name)
        if not (isinstance(weight, int | float) and math.isfinite(weight)):
            raise StateError(f"the weight of adapter '{name}' is {weight!r}; expected a finite number")
    if state.merged is not None:
        raise StateError(
            f"{names_of(state.merged)} is merged into the base; lorakit.unmerge(model) before activating another"
        )
    holding = [n for n in wanted if state.adapters[n].saved]
    if len(holding) > 1 or (holding and wanted[holding[0]] != 1.0):
        raise StateError(
            f"adapter '{holding[0]}' replaces whole weights ({listing(state.adapters[holding[0]].saved, 3)}), which "
            "cannot be mixed or scaled\n"
            "  activate it alone or beside adapters without saved weights, with weight 1"
        )
    set_active(model, state, wanted)


def active(model: nn.Module) -> dict[str, float]:
    """The active adapters and their weights; empty for the base alone."""
    return dict(state_of(model).active)


def adapters(model: nn.Module) -> list[str]:
    """The names of the attached adapters."""
    state = model.__dict__.get(STATE)
    return list(state.adapters) if state else []


def set_active(model: nn.Module, state: State, wanted: dict[str, float]) -> None:
    state.active = wanted
    chosen = [(child_name(n), w) for n, w in wanted.items()]
    for _, layer in layers_of(model):
        layer.lora_active = tuple((child, w) for child, w in chosen if child in layer._modules)
    use_saved(model, state, next((n for n in wanted if state.adapters[n].saved), None))


def use_saved(model: nn.Module, state: State, name: str | None) -> None:
    """Put an adapter's whole weights in place, or the base's own; most adapters have none, and then there is nothing to
    look for.
    """
    if any(attached.saved for attached in state.adapters.values()):
        saved.use(model, name)
