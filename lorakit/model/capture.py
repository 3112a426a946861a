"""Copy an attached adapter off the model, as a value."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import factors_of
from ..adapter.update import Update
from ..bases.pipeline import as_module
from ..layers.layer import child_name
from ..layers.updates.update import LiveUpdate
from .naming import renamed
from .sharded import check_captured
from .state import attached_of, layer_at, saved_parameters, state_of


def capture(model: Any, name: str | None = None) -> Adapter:
    """Return an attached adapter as a value: copies of its updates and saved weights, on the CPU. `model`: a module, or
    a diffusers pipeline.

    `name` may be omitted if only one is attached. Raises StateError if none is, or none of that name, and if its
    parameters are sharded over processes.
    """
    return _value(model, name, _copy)


def as_value(model: Any, name: str | None = None) -> Adapter:
    """Return what `capture` does without copies: its tensors are the model's own, to be looked at while it stays as is.
    Raises as `capture` does.
    """
    return _value(model, name, torch.Tensor.detach)


def _value(model: Any, name: str | None, taken: Callable[[Tensor], Tensor]) -> Adapter:
    model = as_module(model)
    state = state_of(model)
    attached = attached_of(state, name)
    name = name or next(iter(state.adapters))
    own = child_name(name)
    check_captured(
        (f"{m}.{own}.{n}", p) for m in attached.modules for n, p in layer_at(model, m)._modules[own].named_parameters()
    )
    updates: dict[str, Update] = {}
    captured_as: str | None = None
    for m in attached.modules:
        layer = layer_at(model, m)
        child: LiveUpdate = layer._modules[own]
        if child.tied:
            continue
        updates[m] = child.value(layer).map(lambda _, t: taken(t))
        captured_as = captured_as or child.captured_as
    own_saved = dict(saved_parameters(model, state, name))
    check_captured(own_saved.items())
    kept = {full: taken(parameter) for full, parameter in own_saved.items()}
    embeddings = {token: taken(vectors) for token, vectors in attached.embeddings.items()}
    factors = factors_of(updates)
    config = attached.config.of_values(
        {m: f.rank for m, f in factors.items()}, {m: f.alpha for m, f in factors.items()}, captured_as
    )
    adapter = Adapter(config, updates, kept, copy.deepcopy(dict(attached.metadata)), embeddings)
    return renamed(adapter, attached.names)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
