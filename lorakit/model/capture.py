"""An attached adapter as a value."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..layers import saved
from ..layers.layer import LoraFactors, child_name
from .state import attached_of, layer_at, state_of


def capture(model: nn.Module, name: str | None = None) -> Adapter:
    """An attached adapter as a value: copies of its factors and saved weights, on the CPU. `name`: may be left out if it is the only one."""
    state = state_of(model)
    attached = attached_of(state, name)
    name = name or next(iter(state.adapters))
    factors = {}
    for m in attached.modules:
        layer = layer_at(model, m)
        child: LoraFactors = layer._modules[child_name(name)]  # type: ignore[attr-defined]
        A, B = layer.lora_full(child)
        parts = getattr(layer, "lora_parts", None) if child.B.dim() == 3 and child.A.dim() == 2 else None
        factors[m] = Factors(
            _copy(A), _copy(B), child.alpha, layer.lora_kind, child.rslora, layer.lora_transposed and layer.lora_kind == "linear",  # type: ignore[arg-type]
            groups=getattr(layer, "groups", 1) if layer.lora_kind == "conv" else 1, parts=parts,
        )  # fmt: skip
    kept = {}
    for full in attached.saved:
        module_name, _, last = full.rpartition(".")
        child_saved = saved.saved_of(model.get_submodule(module_name))
        assert child_saved is not None
        kept[full] = _copy(child_saved.get(name)[last])
    return Adapter(attached.config, factors, kept, copy.deepcopy(dict(attached.metadata)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
