"""Choose which attached adapters a model uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..adapter.virtual_tokens import BODY
from ..bases.pipeline import as_module
from ..errors import StateError, did_you_mean, listing
from ..layers import saved
from ..layers.layer import child_name
from .state import (
    STATE,
    Attached,
    State,
    Weights,
    attached_of,
    check_not_routed,
    layers_of,
    names_of,
    qualified_name,
    state_of,
)


def activate(model: Any, which: str | Mapping[str, Weights] | None) -> None:
    """Use one adapter, a weighted sum of several (`{"sql": 0.7, "style": 0.3}`), or None for the base alone.

    A weight may also be several, by the beginning of module names: `{"style": {"unet": 0.7, "unet.up_blocks.0": 0.3,
    "text_encoder": 0}}`. The longest counts, and what none of them names has weight 1.

    Raises StateError for an unknown name, a weight that is not finite, while an adapter is merged, inside `route`, and
    when an adapter with saved weights would be scaled, or mixed with another one that replaces the same weights.
    """
    model = as_module(model)
    state = state_of(model)
    check_not_routed(state, "activate")
    weights = weights_of(state, which, "activate(model, which)")
    if state.merged is not None:
        raise StateError(
            f"{names_of(state.merged)} is merged into the base\n  call lorakit.unmerge(model) before activating another"
        )
    set_active(model, state, weights)


def weights_of(state: State, which: str | Mapping[str, Weights] | None, call: str) -> dict[str, Weights]:
    """Return the adapters that `which` names, as `activate` takes it, with their weights.

    `call`: how the caller was called, for the message. Raises StateError as `activate` does for what cannot be active.
    """
    if not isinstance(which, str | Mapping | None):
        raise StateError(
            f"{call}: got a {qualified_name(which)}\n"
            f"  expected a name, None, or names with weights such as {{'a': 0.7, 'b': 0.3}}"
        )
    weights: dict[str, Weights] = {which: 1.0} if isinstance(which, str) else dict(which or {})
    for name, weight in weights.items():
        _check_weights(name, weight, attached_of(state, name))
    check_saved(state, weights)
    check_virtual(state, weights)
    return weights


def _check_weights(name: str, weights: Weights, attached: Attached) -> None:
    """Raise StateError for a weight that is not finite, or is for a part of the model that the adapter leaves alone."""
    parts = weights if isinstance(weights, Mapping) else {None: weights}
    modules = [*attached.modules, *attached.saved]
    for part, weight in parts.items():
        where = f"'{name}'" if part is None else f"'{name}' for '{part}'"
        if isinstance(weight, bool) or not (isinstance(weight, int | float) and math.isfinite(weight)):
            raise StateError(f"the weight of adapter {where} is {weight!r}; expected a finite number")
        if part is not None and not any(_is_in(m, part) for m in modules):
            known = {".".join(m.split(".")[: i + 1]) for m in modules for i in range(m.count(".") + 1)}
            raise StateError(
                f"the weight of adapter {where}: it changes no module there{did_you_mean(part, known)}\n"
                f"  expected the beginning of a module's name, such as {listing(sorted(known), 3)}"
            )


def weight_at(weights: Weights, module: str) -> float:
    """Return an adapter's weight at a module, by its full name."""
    if not isinstance(weights, Mapping):
        return weights
    part = max((part for part in weights if _is_in(module, part)), key=len, default=None)
    return 1.0 if part is None else weights[part]


def _is_in(module: str, part: str) -> bool:
    return f"{module}.".startswith(f"{part}.")


def check_saved(state: State, weights: Mapping[str, Weights], where: str = "") -> None:
    """Raise StateError if an adapter with saved weights would be scaled, or two of them replace the same weight.

    `where`: added to the adapter's name in the message.
    """
    owners: dict[str, str] = {}
    for name, weight in weights.items():
        own = state.adapters[name].saved
        scaled = [full for full in own if weight_at(weight, full) != 1.0]
        if scaled:
            raise StateError(
                f"adapter '{name}'{where} replaces weights of the base ({listing(scaled, 3)}), which cannot be scaled "
                f"(its weight is {weight_at(weight, scaled[0]):g})\n"
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


def check_virtual(state: State, weights: Mapping[str, Weights]) -> None:
    """Raise StateError if virtual tokens would be scaled, or those of two adapters would stand in one row."""
    own = {name: weight_at(w, BODY) for name, w in weights.items() if BODY in state.adapters[name].modules}
    used = [name for name, weight in own.items() if weight != 0]
    scaled = next((name for name in used if own[name] != 1), None)
    if scaled is not None:
        raise StateError(
            f"adapter '{scaled}' has virtual tokens, which cannot be scaled (its weight is {own[scaled]:g})\n"
            "  use it with weight 1"
        )
    if len(used) > 1:
        raise StateError(
            f"adapters {listing([repr(name) for name in used])} all have virtual tokens, and a row has those of one\n"
            "  use one of them; an adapter without virtual tokens can be used beside it"
        )


def active(model: Any) -> dict[str, Weights]:
    """Return the active adapters and their weights; empty for the base alone. Raises StateError if none is attached."""
    return dict(state_of(as_module(model)).active)


def adapters(model: Any) -> list[str]:
    """Return the names of the attached adapters; empty if there are none."""
    state = as_module(model).__dict__.get(STATE)
    return list(state.adapters) if state else []


def set_active(model: nn.Module, state: State, weights: dict[str, Weights]) -> None:
    """Set every layer's active updates, and the saved weights of the adapter that has some. `weights` is checked."""
    state.active = weights
    children = [(child_name(n), w) for n, w in weights.items()]
    for name, layer in layers_of(model):
        own = layer.lora_name or name
        layer.lora_active = tuple((child, weight_at(w, own)) for child, w in children if child in layer._modules)
    use_saved(model, state, weights)


def use_saved(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Switch to these adapters' saved weights, and to the base's where they have none."""
    if any(attached.saved for attached in state.adapters.values()):  # most have none: skip the walk over all modules
        saved.use(model, [n for n in names if state.adapters[n].saved])
