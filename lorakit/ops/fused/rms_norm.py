"""RMSNorm with a frozen weight (Zhang and Sennrich 2019), as one autograd node.

    y = (o + w) · x / √(mean(x²) + ε)        x: [..., width], the mean over the last axis, in float32

Saved for backward: x in its own dtype and one float per row; plain autograd saves a float32 copy of x.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import without_autocast


class NormVariant(Enum):
    """The variants in models: the offset o, and whether the result is rounded to x's dtype before or after multiplying
    by the weight.
    """

    ROUNDED_FIRST = (0, False)  # Llama: w · (x̂ rounded)
    ROUNDED_LAST = (0, True)  # Olmo 2: (w · x̂) rounded
    FROM_ONE = (1, True)  # Gemma: ((1 + w) · x̂) rounded

    @property
    def offset(self) -> int:
        return self.value[0]

    @property
    def rounded_last(self) -> bool:
        return self.value[1]


def reference(x: Tensor, weight: Tensor, eps: float, variant: NormVariant = NormVariant.ROUNDED_FIRST) -> Tensor:
    """Compute the equation in plain operations, rounded as `variant` says."""
    wide = x.to(_wide(x))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if variant.rounded_last:
        return (normed * _factor(weight, variant, wide.dtype)).to(x.dtype)
    return weight * normed.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, variant: NormVariant = NormVariant.ROUNDED_FIRST) -> Tensor:
    """Compute RMSNorm, with the same bits as `reference`. `weight`: [width], gets no gradient."""
    return _RmsNorm.apply(x, weight, eps, variant)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _factor(weight: Tensor, variant: NormVariant, dtype: torch.dtype) -> Tensor:
    return variant.offset + weight.to(dtype) if variant.offset else weight.to(dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, variant: NormVariant) -> Tensor:
        wide = x.to(_wide(x))
        rate = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, rate, weight)
        ctx.variant = variant
        normed = wide * rate
        if variant.rounded_last:
            return normed.mul_(_factor(weight, variant, wide.dtype)).to(x.dtype)
        normed = normed.to(x.dtype)
        return weight * normed if weight.dtype != x.dtype else normed.mul_(weight)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, rate, weight = ctx.saved_tensors
        wide = x.to(_wide(x)) * rate  # x̂
        d = (
            g.to(wide.dtype) * _factor(weight, ctx.variant, wide.dtype)
            if ctx.variant.rounded_last
            else (g * weight).to(wide.dtype)
        )
        along = (d * wide).mean(-1, keepdim=True)
        return d.sub_(wide.mul_(along)).mul_(rate).to(x.dtype), None, None, None
