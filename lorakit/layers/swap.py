"""The class swap: a targeted module stays the same object, but becomes an instance of a subclass of its own class.

The subclass has the module's mixin in front: `LoraLinear = type("LoraLinear", (LinearLayer, nn.Linear))`, created once
per base class, as torch's parametrizations do. `release` restores the module's own class.
"""

from __future__ import annotations

from torch import nn

from .bases import base_of
from .conv import ConvLayer
from .embedding import EmbeddingLayer
from .expert_weight import ExpertWeight
from .experts import ExpertWeightLayer
from .layer import COUNT, LoraLayer, adapted_class, mixin_and_base, rebind_hooked_forward
from .linear import Conv1DLayer, LinearLayer
from .multihead import MultiheadLayer, PackedMultiheadLayer
from .packed import PackedConv1DLayer, PackedLayer
from .virtual.body import BodyLayer

_PACKED: dict[type[LoraLayer], type[PackedLayer]] = {
    LinearLayer: PackedLayer,
    Conv1DLayer: PackedConv1DLayer,
    MultiheadLayer: PackedMultiheadLayer,
}


def mixin_for(module: nn.Module) -> type[LoraLayer] | None:
    """Return the mixin that adapts this module, None if no low-rank update is defined for it."""
    if isinstance(module, BodyLayer):
        return None
    if isinstance(module, LoraLayer):
        return mixin_and_base(type(module))[0]
    if isinstance(module, nn.Linear) or base_of(module).is_linear(module):
        return LinearLayer
    if isinstance(module, ExpertWeight):
        return ExpertWeightLayer
    if isinstance(module, nn.MultiheadAttention):
        own_forward = type(module).forward is nn.MultiheadAttention.forward
        one_weight = module.in_proj_weight is not None and isinstance(module.out_proj, nn.Linear)
        return MultiheadLayer if own_forward and one_weight else None
    if isinstance(module, nn.Embedding) and (
        type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    ):
        return EmbeddingLayer  # other forwards may compute indices (positions, say) from their input
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not isinstance(
        module, nn.modules.conv._ConvTransposeNd
    ):
        return ConvLayer
    if any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__):
        return Conv1DLayer
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether this module is a linear, or computes with one weight as linears do (torch's attention)."""
    mixin = mixin_for(module)
    return mixin is not None and issubclass(mixin, LinearLayer)


def adopt(module: nn.Module, parts: tuple[bool, ...] | None = None, is_body: bool = False) -> None:
    """Give the module its adapted class, if it does not have it yet. `parts`: which of a packed projection's parts are
    adapted; `is_body`: it is a model's body, for virtual tokens.
    """
    if isinstance(module, LoraLayer):
        return
    mixin = BodyLayer if is_body else mixin_for(module)
    assert mixin is not None
    if parts is not None:
        mixin = _PACKED[mixin]
    _set_class(module, adapted_class(mixin, type(module)))
    assert isinstance(module, LoraLayer)
    if parts is not None:
        assert isinstance(module, PackedLayer)
        module.lora_parts = parts
    module.lora_active = ()
    module.lora_merged = None
    rebind_hooked_forward(module)
    module.lora_adopted()


def release(module: nn.Module) -> None:
    """Restore the module's own class. Its updates must have been removed."""
    if not isinstance(module, LoraLayer):
        return
    module.lora_released()
    _set_class(module, mixin_and_base(type(module))[1])
    for name in ("lora_active", "lora_merged", "lora_parts", COUNT):
        module.__dict__.pop(name, None)
    rebind_hooked_forward(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
