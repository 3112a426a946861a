"""Scale the rows and columns of a frozen matrix by two trained vectors (VeRA; Kopiczko et al. 2024, equation 2).

    B' = diag(b) B diag(d)        b: [out]   d: [r]   B: [out, r]
    db = (g ∘ B) d        dd = (g ∘ B)ᵀ b        g: the gradient of B'

`reference` is the first line. `scaled` is one autograd node, which keeps its inputs but no product of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .linear import needs_plain


def reference(B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Compute the equation."""
    return b[:, None] * B * d


def scaled(B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Return diag(b) B diag(d). B gets no gradient."""
    if needs_plain() or not (torch.is_grad_enabled() and (b.requires_grad or d.requires_grad)):
        return reference(B, b, d)
    return _Scaled.apply(B, b, d)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(B, b, d)
        return reference(B, b, d)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        B, b, d = ctx.saved_tensors
        product = g * B
        return None, (product @ d.to(product.dtype)).to(b.dtype), (product.mT @ b.to(product.dtype)).to(d.dtype)
