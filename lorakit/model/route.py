"""Mix adapters in one batch: one choice per row, for any forward and for `generate`, or per token of a packed batch.

    with lk.route(model, ["sql", None, {"sql": 0.7, "style": 0.3}]):
        model(batch)                                     # three rows
    with lk.route(model, ["sql"] * 40 + ["style"] * 25, per="token"):
        model(packed)                                    # [1, 65]

`layers.batched` computes the rows in few matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from torch import nn

from ..adapter.virtual_tokens import BODY
from ..bases.pipeline import as_module
from ..errors import StateError
from ..layers.batched.expert_rows import checked
from ..layers.batched.routes import Choice, Chosen, Routes, Routing
from ..layers.batched.saved_rows import routed
from ..layers.expert_weight import ExpertWeight
from ..layers.layer import child_name
from .activate import check_saved, use_saved
from .state import State, Weights, attached_of, check_not_routed, layer_at, names_of, state_of

Which = str | Mapping[str, Weights] | None  # weights by component or block are refused: they are for `activate`


@contextmanager
def route(
    model: Any, choices: Sequence[Which], repeat: int = 1, *, per: Literal["row", "token"] = "row"
) -> Iterator[None]:
    """Use a different adapter for each row of the batch: an adapter's name, a weighted mix, or None for the base.

    `repeat`: consecutive rows per choice; for `generate`, the larger of `num_beams` and `num_return_sequences`. The
    guidance of a diffusion pipeline doubles the batch in blocks, all negative prompts and then all prompts: there give
    `choices * 2`.
    `per="token"`: one choice per token of a packed batch [1, tokens], as serving engines and packed training rows use;
    the model still decides which tokens attend to which (`position_ids`, or a mask). On exit, also after an exception,
    the adapters that were active before are active again. With gradient checkpointing, call backward inside the
    context, since it runs the forward again. A module that an adapter holds whole, such as a classifier's head, runs
    once for each version of its weights, on the rows that use it. Raises StateError for an unknown name, while an
    adapter is merged, and for a choice that scales saved weights or names the same twice; inside the context, for a
    batch with another number of rows or tokens.
    """
    model = as_module(model)
    state = state_of(model)
    check_not_routed(state, "route")
    if state.merged is not None:
        raise StateError(
            f"{names_of(state.merged)} is merged into the base, for every row\n  call lorakit.unmerge(model) first"
        )
    if isinstance(choices, str | Mapping) or not isinstance(choices, Sequence):
        raise StateError(
            f"route(model, choices): got {choices!r}\n"
            "  expected a list with one choice per row or token, such as ['a', None]"
        )
    if per not in ("row", "token"):
        raise StateError(
            f"route(..., per={per!r}): expected 'row', or 'token' for a packed batch with one choice per token"
        )
    if not isinstance(repeat, int) or repeat < 1:
        raise StateError(f"route(..., repeat={repeat!r}): expected the rows per choice, an integer of at least 1")
    if per == "token" and repeat > 1:
        raise StateError(
            f"route(..., repeat={repeat}, per='token'): repeat is for rows only\n  give one choice per token"
        )
    resolved: dict[str, Choice] = {}
    holders: set[str] = set()
    chosen = tuple(_resolve(state, f"{per} {n}", choice, resolved, holders) for n, choice in enumerate(choices))
    if state.routes is None:
        adapted = dict.fromkeys(m for attached in state.adapters.values() for m in attached.modules)
        state.routes = Routes({layer_at(model, m): m for m in adapted}, state.expected, state.fixed)
    routes = state.routes
    routing = routes.routing(Chosen(chosen, repeat, per == "token"))
    in_use = [n for n in state.active if state.adapters[n].saved]
    if in_use:
        use_saved(model, state, ())
    state.routing = routing
    for layer in routes.names:
        layer.__dict__["lora_route"] = routing
    experts = [(name, layer) for layer, name in routes.names.items() if isinstance(layer, ExpertWeight)]
    try:
        with (
            _rows_of_saved(model, state, routing, choices, holders) if holders else nullcontext(),
            checked(model, routing, experts) if experts else nullcontext(),
        ):
            yield
    finally:
        for layer in routes.names:
            layer.__dict__.pop("lora_route", None)
        state.routing = None
        if in_use:
            use_saved(model, state, in_use)


def expect(model: Any, adapters: int, fixed: bool = False) -> None:
    """Say how many adapters will be attached at once at most, so that `route` has room for them from the start.

    fixed: from now on, their values do not change while they are attached, so that `route` need not look for changes
    in every layer. Holds until the last one is detached. Raises StateError if none is attached.
    """
    state = state_of(as_module(model))
    if state.routes is not None:
        stacks = state.routes.stacks
        if fixed and not state.fixed:
            stacks.of.clear()  # what is in them may have changed since
        stacks.expected, stacks.fixed = adapters, fixed
    state.expected, state.fixed = adapters, fixed


def _rows_of_saved(
    model: nn.Module, state: State, routing: Routing, choices: Sequence[Which], holders: set[str]
) -> AbstractContextManager[None]:
    """Return a context in which modules that adapters of the batch hold whole use each row's own parameters.

    `holders`: those adapters.
    """
    adapters = [tuple(n for n, weight in _weights(choice).items() if weight and n in holders) for choice in choices]
    names = dict.fromkeys(full.rpartition(".")[0] for n in sorted(holders) for full in state.adapters[n].saved)
    return routed([(name, model.get_submodule(name)) for name in names], routing, adapters)


def _weights(choice: Which) -> Mapping[str, Weights]:
    return {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice


def _resolve(state: State, where: str, choice: Which, resolved: dict[str, Choice], holders: set[str]) -> Choice:
    """Check a choice and resolve it to children and weights. `where`: the row or token, for errors.

    `resolved` caches by name, since a batch names few adapters many times; `holders` collects the adapters that have
    saved weights.
    """
    if choice is None:
        return ()
    if isinstance(choice, str):
        if choice not in resolved:
            resolved[choice] = _resolve(state, where, {choice: 1.0}, resolved, holders)
        return resolved[choice]
    if not isinstance(choice, Mapping):
        raise StateError(
            f"{where} of route's choices is {choice!r}\n"
            f"  expected a name, None, or names with weights such as {{'a': 0.7}}"
        )
    numbers: list[tuple[str, float]] = []
    for name, weight in choice.items():
        attached_of(state, name)
        if isinstance(weight, Mapping):
            raise StateError(
                f"the weight of adapter '{name}' ({where}) is {dict(weight)}; expected a finite number\n"
                "  weights by component or block are for lorakit.activate, which is for all rows"
            )
        if isinstance(weight, bool) or not (isinstance(weight, int | float) and math.isfinite(weight)):
            raise StateError(f"the weight of adapter '{name}' ({where}) is {weight!r}; expected a finite number")
        if weight and BODY in state.adapters[name].modules:
            raise StateError(
                f"{where} of route's choices is '{name}', which has virtual tokens: rows with and without them have "
                "different lengths inside the model\n"
                f"  use it for all rows: activate(model, '{name}')"
            )
        if weight and state.adapters[name].saved:
            holders.add(name)
        numbers.append((child_name(name), float(weight)))
    if holders:
        check_saved(state, {name: weight for name, weight in choice.items() if weight}, f" ({where})")
    return tuple((child, weight) for child, weight in numbers if weight)
