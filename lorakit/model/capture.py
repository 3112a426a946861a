"""Copy an attached adapter off the model, as a value."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..layers import saved
from ..layers.layer import child_name
from ..layers.updates.update import LiveUpdate
from .state import attached_of, layer_at, state_of


def capture(model: nn.Module, name: str | None = None) -> Adapter:
    """Return an attached adapter as a value: copies of its updates and saved weights, on the CPU.

    `name` may be omitted if only one is attached. Raises StateError if none is, or none of that name.
    """
    state = state_of(model)
    attached = attached_of(state, name)
    name = name or next(iter(state.adapters))
    updates: dict[str, Update] = {}
    for m in attached.modules:
        layer = layer_at(model, m)
        child: LiveUpdate = layer._modules[child_name(name)]
        if child.tied:
            continue
        updates[m] = child.value(layer).map(lambda _, t: _copy(t))
    kept = {}
    for full in attached.saved:
        module_name, _, last = full.rpartition(".")
        child_saved = saved.saved_of(model.get_submodule(module_name))
        assert child_saved is not None
        kept[full] = _copy(child_saved.get(name)[last])
    return Adapter(attached.config, updates, kept, copy.deepcopy(dict(attached.metadata)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
