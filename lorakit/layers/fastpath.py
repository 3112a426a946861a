"""Disable the fast path of `nn.TransformerEncoderLayer`, which in eval mode reads weights without calling its children.

An adapter on such a child would silently have no effect. The layer takes the fast path only if its flag says that the
activation is ReLU or GELU, and the encoder packs rows for it only if `use_nested_tensor` is set. With these flags off,
both compute the same through their children. `detach` restores the flags.
"""

from __future__ import annotations

from torch import nn

from .layer import LoraLayer
from .walk import base_modules

_FLAGS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_ORIGINAL = "_lora_fast_path"  # the attribute that stores a disabled flag's value


def close(model: nn.Module) -> None:
    """Disable the fast path of every encoder (layer) that contains an adapted module."""
    for _, module in base_modules(model):
        for kind, flag, disabled in _FLAGS:
            if isinstance(module, kind) and _contains_adapted(module):
                module.__dict__.setdefault(_ORIGINAL, getattr(module, flag))
                setattr(module, flag, disabled)


def reopen(model: nn.Module) -> None:
    """Enable the fast path again in every encoder (layer) without adapted modules."""
    for _, module in base_modules(model):
        for kind, flag, _ in _FLAGS:
            if isinstance(module, kind) and _ORIGINAL in module.__dict__ and not _contains_adapted(module):
                setattr(module, flag, module.__dict__.pop(_ORIGINAL))


def _contains_adapted(module: nn.Module) -> bool:
    return any(isinstance(m, LoraLayer) for _, m in base_modules(module))
