"""RMSNorm with a frozen weight (Zhang and Sennrich 2019), as one autograd node.

    y = w · x / √(mean(x²) + ε)        x: [..., width], the mean over the last axis, in float32

Kept for backward: x as it came and one number a row, where plain autograd keeps a float32 copy of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import without_autocast


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation, rounded where transformers rounds it: to x's dtype before the weight."""
    wide = x.to(_wide(x))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same bits; `weight` takes no gradient."""
    return _RmsNorm.apply(x, weight, eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x))
        rate = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, rate, weight)
        normed = (wide * rate).to(x.dtype)
        return weight * normed if weight.dtype != x.dtype else normed.mul_(weight)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, rate, weight = ctx.saved_tensors
        wide = x.to(_wide(x)) * rate  # x̂
        d = (g * weight).to(wide.dtype)
        along = (d * wide).mean(-1, keepdim=True)
        return d.sub_(wide.mul_(along)).mul_(rate).to(x.dtype), None, None
