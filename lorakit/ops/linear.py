"""The low-rank update of a linear layer (Hu et al. 2021, section 4.1).

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        x: [..., in]   W: [out, in]   A: [r, in]   B: [out, r]   s = alpha / r

`reference` is that line for the update, `add_low_rank` the same as one autograd node that writes into y, and
`frozen_linear` the whole line as one node for a frozen W. Both keep x and the [.., r] product for backward; the fp32
master factors are cast to the activation's dtype for the matmuls and activations are never upcast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """s · (x Aᵀ) Bᵀ; x: [..., in] -> [..., out], in x's dtype."""
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scale


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, into: bool = True) -> Tensor:
    """y + s · (x Aᵀ) Bᵀ; y: [..., out]. `into`: y is a fresh tensor that nothing else keeps, and may be written into."""
    x = x.to(y.dtype)
    if not into or needs_plain() or y.dim() < 2 or (y.requires_grad and y.is_leaf):
        return y + reference(x, A, B, scale)
    return _AddLowRank.apply(y, x, A, B, scale)


def needs_plain() -> bool:
    """Whether only plain operations will do: the compiler fuses them itself, and torch.func cannot look into our nodes."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def frozen_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x Wᵀ + b + s · (x Aᵀ) Bᵀ for a W (and bias) that takes no gradient."""
    return _FrozenLinear.apply(x, W, bias, A, B, scale)


def add_packed(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, parts: tuple[bool, ...]) -> Tensor:
    """y + s · (each adapted part's own update); y: [..., out], A: [n·r, in], B: [n, out/parts, r]."""
    x = x.to(y.dtype)
    down = F.linear(x, A.to(y.dtype)).unflatten(-1, (B.shape[0], -1))  # [..., n, r]
    pieces, used = list(y.chunk(len(parts), dim=-1)), 0
    for i, adapted in enumerate(parts):
        if adapted:
            pieces[i] = pieces[i] + scale * F.linear(down[..., used, :], B[used].to(y.dtype))
            used += 1
    return torch.cat(pieces, dim=-1)


def _low_rank_gradients(ctx, g: Tensor, x: Tensor, down: Tensor, A: Tensor, B: Tensor):
    """Returns s·(g B): [N, r] and the gradients of A and B, each only where it is needed. g: [N, out], x: [N, in], down: [N, r]."""
    inner = (g @ B.to(g.dtype)).mul_(ctx.scale) if ctx.low_rank_input else None
    dA = (inner.T @ x).to(A.dtype) if inner is not None and ctx.needs_A else None
    dB = (g.T @ down).to(B.dtype).mul_(ctx.scale) if ctx.needs_B else None
    return inner, dA, dB


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        down = x2 @ A.to(y.dtype).T  # [N, r]
        out = y if y.is_contiguous() else y.contiguous()
        out.view(-1, out.shape[-1]).addmm_(down, B.to(y.dtype).T, alpha=scale)
        ctx.scale, ctx.needs_A, ctx.needs_B = scale, ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        ctx.low_rank_input = ctx.needs_input_grad[1] or ctx.needs_A
        ctx.save_for_backward(x2 if ctx.needs_A else None, down if ctx.needs_B else None, A, B)
        ctx.shape = x.shape
        if out is y:
            ctx.mark_dirty(y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, down, A, B = ctx.saved_tensors
        inner, dA, dB = _low_rank_gradients(ctx, g.reshape(-1, g.shape[-1]), x, down, A, B)
        dx = (inner @ A.to(g.dtype)).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return g, dx, dA, dB, None


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        out = F.linear(x2, W, bias)  # [N, out]
        down = x2 @ A.to(x.dtype).T  # [N, r]
        out.addmm_(down, B.to(x.dtype).T, alpha=scale)
        ctx.scale, ctx.needs_A, ctx.needs_B = scale, ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        ctx.low_rank_input = ctx.needs_input_grad[0] or ctx.needs_A
        ctx.save_for_backward(x2 if ctx.needs_A else None, down if ctx.needs_B else None, A, B, W if ctx.needs_input_grad[0] else None)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, down, A, B, W = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        inner, dA, dB = _low_rank_gradients(ctx, g2, x, down, A, B)
        # One [N, in] buffer: the base's input gradient, then the update's added into it.
        dx = (g2 @ W).addmm_(inner, A.to(g.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, dA, dB, None
