"""Add a low-rank update to a linear layer's output (Hu et al. 2021, section 4.1).

    y + s · (drop(x) Aᵀ) Bᵀ        y: [..., out]   x: [..., in]   A: [r, in]   B: [out, r]   s = alpha / r

For bases of which only the output is available (quantized, hooked or transposed weights). `reference` is that line for
the update, `add_low_rank` the same as one autograd node that writes into y. A plain frozen linear and its update are
one node together, see `projections`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import is_casting, without_autocast
from .dropout import Mask, kept_share, masked, masked_input, scaled
from .groups import add_product, gradient_of_B, groups, product


def reference(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return s · (x Aᵀ) Bᵀ: [..., out], in x's dtype. x: [..., in]."""
    # Scale the narrow product: on the wide one, backward would make a scaled copy of the output's gradient.
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def add_low_rank(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, mask: Mask | None = None, into: bool = True
) -> Tensor:
    """Return y + s · (drop(x) Aᵀ) Bᵀ, [..., out].

    `into`: y is a new tensor that nothing else references, so it may be written into. A [G, r, in] and B [G, out, r]
    are for groups of rows, see `projections`.
    """
    x = x.to(y.dtype)
    # Autocast casts the operands of products, but not of in-place products.
    if not into or is_casting(x) or needs_plain() or y.dim() < 2 or (y.requires_grad and y.is_leaf):
        return y + reference(scaled(x, mask) if mask else x, A, B, scale)
    # When decoding, an autograd node's own cost would be noticeable.
    if not (mask or torch.is_grad_enabled()) and y.is_contiguous() and A.dim() == 2:
        down = product(x.reshape(-1, x.shape[-1]), A.to(y.dtype).T, scale)
        y.view(-1, y.shape[-1]).addmm_(down, B.to(y.dtype).T)
        return y
    return _AddLowRank.apply(y, x, A, B, scale, mask.p if mask else 0.0, mask.state if mask else None)


def needs_plain() -> bool:
    """Whether only plain operations may be used: torch.compile fuses them itself, and torch.func cannot transform our
    nodes.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def add_packed(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, parts: tuple[bool, ...], into: bool = False
) -> Tensor:
    """Return y plus the update of each adapted part of a packed projection, [..., out].

    A: [n·r, in], B: [n, out/parts, r], `parts`: which are adapted; `into`: see `add_low_rank`.
    """
    x = x.to(y.dtype)
    down = F.linear(x, A.to(y.dtype)).unflatten(-1, (B.shape[0], -1))  # [..., n, r]
    adapted = [i for i, used in enumerate(parts) if used]
    if into and not torch.is_grad_enabled() and not needs_plain() and y.is_contiguous() and y.dim() > 1:
        columns = y.view(-1, y.shape[-1]).chunk(len(parts), dim=1)
        for used, i in enumerate(adapted):
            columns[i].addmm_(down[..., used, :].reshape(-1, down.shape[-1]), B[used].to(y.dtype).T, alpha=scale)
        return y
    pieces = list(y.chunk(len(parts), dim=-1))
    for used, i in enumerate(adapted):
        pieces[i] = pieces[i] + scale * F.linear(down[..., used, :], B[used].to(y.dtype))
    return torch.cat(pieces, dim=-1)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, state: Tensor | None
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        scale = scale / kept_share(p)
        dropped = masked_input(x2, None if state is None else Mask(p, state))
        down = product(groups(dropped, A), A.to(y.dtype).mT, scale)  # [N, r]
        out = y if y.is_contiguous() else y.contiguous()
        add_product(out.view(-1, out.shape[-1]), down, B.to(y.dtype).mT)
        ctx.scale, ctx.p, ctx.shape = scale, p, x.shape
        _, needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        kept = state if needs_x or needs_A else None
        ctx.save_for_backward(x2 if needs_A else None, kept, down if needs_B else None, A, B)
        if out is y:
            ctx.mark_dirty(y)
        return out

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, state, down, A, B = ctx.saved_tensors
        _, needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        mask = None if state is None else Mask(ctx.p, state)
        g2 = g.reshape(-1, g.shape[-1])
        dx = dA = None
        if needs_x or needs_A:
            inner = product(groups(g2, B), B.to(g.dtype), ctx.scale)  # [N, r]
            if needs_A:
                dA = (inner.mT @ groups(masked_input(x, mask), A)).to(A.dtype)
            if needs_x:
                dx = (inner @ A.to(g.dtype)).view(-1, ctx.shape[-1])
                dx = (dx if mask is None else masked(dx, mask)).view(ctx.shape)
        dB = gradient_of_B(down, g2, B.dtype) if needs_B else None
        return g, dx, dA, dB, None, None, None
