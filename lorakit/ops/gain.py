"""Multiply a layer's output, but for its bias, by a factor for each output (DoRA's m / ‖V‖: Liu et al. 2024, eq. 5).

    y + h ∘ (y0 - b)        y, y0: [..., out]   b: [out]   h: [out], or one for each row of a batch

y0 is the base's output and h = weight · (g - 1): the factor g itself would lose a small change when it is rounded to 16
bits. `reference` is that line; `add_gain` is one autograd node, which saves y0 - b for h's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .linear import needs_plain


def excess(gain: Tensor, weight: float) -> Tensor:
    """Return h = weight · (g - 1)."""
    return gain - 1 if weight == 1 else (gain - 1) * weight


def reference(y: Tensor, y0: Tensor, h: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the equation. h and bias: of a shape that broadcasts to y0's."""
    linear = y0 if bias is None else y0 - bias.to(y0.dtype)
    return torch.addcmul(y, linear, h.to(y0.dtype))


def add_gain(y: Tensor, y0: Tensor, h: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y + h ∘ (y0 - b) as a new tensor of y's dtype. h, bias: as in `reference`; y may be y0 itself."""
    if not torch.is_grad_enabled() or needs_plain() or (bias is not None and bias.requires_grad):
        return reference(y, y0, h, bias)
    return _AddGain.apply(None if y is y0 else y, y0, h, bias)


class _AddGain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor | None, y0: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        linear = y0 if bias is None else y0 - bias.to(y0.dtype)
        ctx.apart = y is not None
        ctx.save_for_backward(linear if ctx.needs_input_grad[2] else None, h)
        return torch.addcmul(y0 if y is None else y, linear, h.to(y0.dtype))

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        linear, h = ctx.saved_tensors
        needs_y, needs_y0, needs_h = ctx.needs_input_grad[:3]
        dh = gradient_of_gain(g, linear, h) if needs_h else None
        if not needs_y0:
            return g if needs_y else None, None, dh, None
        dy0 = g * h.to(g.dtype) if ctx.apart else times_gain(g, h)
        return g if needs_y else None, dy0, dh, None


def times_gain(g: Tensor, h: Tensor) -> Tensor:
    """Return (1 + h) ∘ g. The product with 1 + h, rounded to 16 bits, would lose a small h."""
    return torch.addcmul(g, g, h.to(g.dtype))


def gradient_of_gain(g: Tensor, linear: Tensor, h: Tensor) -> Tensor:
    """Return Σ g ∘ (y0 - b) over the axes along which h is broadcast, in h's dtype."""
    product = g * linear
    lead = product.dim() - h.dim()
    axes = [*range(lead), *(lead + i for i, size in enumerate(h.shape) if size == 1 != product.shape[lead + i])]
    return (product.sum(axes, keepdim=False, dtype=h.dtype) if axes else product.to(h.dtype)).view(h.shape)
