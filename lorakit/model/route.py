"""Batches that mix adapters: one choice per row, for any forward and for `generate`, or one per token of a packed
batch.

    with lk.route(model, ["sql", None, {"sql": 0.7, "style": 0.3}]):
        model(batch)                                     # three rows
    with lk.route(model, ["sql"] * 40 + ["style"] * 25, per="token"):
        model(packed)                                    # [1, 65]

How the rows are computed in few products: `layers.batched`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from ..errors import StateError, listing
from ..layers import saved
from ..layers.batched.routes import Choice, Chosen, Routes
from ..layers.layer import child_name
from .state import State, attached_of, check_not_routed, layer_at, names_of, state_of

Which = str | Mapping[str, float] | None


@contextmanager
def route(
    model: nn.Module, choices: Sequence[Which], repeat: int = 1, *, per: Literal["row", "token"] = "row"
) -> Iterator[None]:
    """Let each row of the batch use the adapter (or weighted mix, or None for the base) that `choices` names for it.

    `repeat`: each choice stands for so many consecutive rows, as beams and returned sequences do: `num_beams` or
    `num_return_sequences` of `generate` (their larger one). `per="token"` is for packed batches, [1, tokens], of
    serving engines and packed training rows: there is one choice for each token, in their order. Which tokens attend to
    which is the model's matter (`position_ids`, or a mask). What was active before is active again afterwards, also
    after an exception. A backward with gradient checkpointing must be inside too, because it runs the forward again.
    Raises StateError for an unknown name, while something is merged, and for adapters with whole weights of their own;
    within, for a batch with another number of rows or tokens.
    """
    state = state_of(model)
    check_not_routed(state, "route")
    if state.merged is not None:
        raise StateError(
            f"{names_of(state.merged)} is merged into the base, for every row\n  lorakit.unmerge(model) first"
        )
    if isinstance(choices, str | Mapping) or not isinstance(choices, Sequence):
        raise StateError(
            f"route(model, choices): got {choices!r}\n"
            "  expected a list with one choice per row or token, such as ['a', None]"
        )
    if per not in ("row", "token"):
        raise StateError(
            f"route(..., per={per!r}): expected 'row', or 'token' for a packed batch with a choice per token"
        )
    if not isinstance(repeat, int) or repeat < 1:
        raise StateError(f"route(..., repeat={repeat!r}): expected a whole number of rows per choice, 1 or more")
    if per == "token" and repeat > 1:
        raise StateError(
            f"route(..., repeat={repeat}, per='token'): tokens do not come several times\n"
            "  name a choice for each token"
        )
    read: dict[str, Choice] = {}
    chosen = tuple(_read(state, f"{per} {n}", choice, read) for n, choice in enumerate(choices))
    if state.routes is None:
        named = dict.fromkeys(m for attached in state.adapters.values() for m in attached.modules)
        state.routes = Routes({layer_at(model, m): m for m in named})
    routes = state.routes
    routing = routes.routing(Chosen(chosen, repeat, per == "token"))
    whole = next((n for n in state.active if state.adapters[n].saved), None)
    if whole is not None:
        saved.use(model, None)
    state.routing = routing
    for layer in routes.names:
        layer.__dict__["lora_route"] = routing
    try:
        yield
    finally:
        for layer in routes.names:
            layer.__dict__.pop("lora_route", None)
        state.routing = None
        if whole is not None:
            saved.use(model, whole)


def _read(state: State, where: str, choice: Which, read: dict[str, Choice]) -> Choice:
    """A choice as children and weights, checked. `where`: which row or token. `read`: what names came before, for a
    batch names few adapters many times.
    """
    if choice is None:
        return ()
    if isinstance(choice, str):
        if choice not in read:
            read[choice] = _read(state, where, {choice: 1.0}, read)
        return read[choice]
    if not isinstance(choice, Mapping):
        raise StateError(
            f"{where} of route's choices is {choice!r}\n"
            f"  expected a name, None, or names with weights such as {{'a': 0.7}}"
        )
    for name, weight in choice.items():
        attached = attached_of(state, name)
        if attached.saved:
            raise StateError(
                f"adapter '{name}' ({where}) replaces whole weights ({listing(attached.saved, 3)}), which rows and "
                "tokens cannot have each for themselves\n"
                "  lorakit.activate(model, name), and give its rows a batch of their own"
            )
        if isinstance(weight, bool) or not (isinstance(weight, int | float) and math.isfinite(weight)):
            raise StateError(f"the weight of adapter '{name}' ({where}) is {weight!r}; expected a finite number")
    return tuple((child_name(name), float(weight)) for name, weight in choice.items() if weight)
