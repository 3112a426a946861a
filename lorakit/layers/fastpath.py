"""`nn.TransformerEncoderLayer`'s fast path reads its children's weights in eval and never calls them.

An adapter on such a child would silently have no effect. The layer takes the path only if it thinks its activation is
ReLU or GELU, and the encoder packs rows for it only if `use_nested_tensor` is set; with these marks off both compute
the same through their children. `detach` puts the marks back.
"""

from __future__ import annotations

from torch import nn

from .layer import LoraLayer
from .walk import base_modules

_MARKS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_KEPT = "_lora_fast_path"


def close(model: nn.Module) -> None:
    """Close the fast path of every encoder (layer) that holds an adapted module."""
    for _, module in base_modules(model):
        for kind, mark, closed in _MARKS:
            if isinstance(module, kind) and _holds_adapted(module):
                module.__dict__.setdefault(_KEPT, getattr(module, mark))
                setattr(module, mark, closed)


def reopen(model: nn.Module) -> None:
    """Give every encoder (layer) without adapted modules its fast path back."""
    for _, module in base_modules(model):
        for kind, mark, _ in _MARKS:
            if isinstance(module, kind) and _KEPT in module.__dict__ and not _holds_adapted(module):
                setattr(module, mark, module.__dict__.pop(_KEPT))


def _holds_adapted(module: nn.Module) -> bool:
    return any(isinstance(m, LoraLayer) for _, m in base_modules(module))
