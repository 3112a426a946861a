"""Frozen linears of one input, each with a low-rank update, as one autograd node (Hu et al. 2021, section 4.1).

    y_i = x W_iᵀ + b_i + s_i · (drop(x) A_iᵀ) B_iᵀ        x: [..., in]   W_i: [out_i, in]
                                                          A_i: [r_i, in]   B_i: [out_i, r_i]

A single linear (`project`), or gate and up together (in `fused.gated_mlp`). All A are concatenated for the product with
x and for their gradients, and all input gradients are summed in one buffer. Saved for backward: x (once), the [N, r]
products, and the packed dropout mask. The float32 master factors are cast to x's dtype for the matmuls; activations are
never upcast.

A projection may have a gain h [out], which multiplies x W_iᵀ by 1 + h (see `gain`).

In a batch that trains G adapters at once (see `lorakit.route`), with equally many rows each, adapter by adapter, A is
[G, r, in], B is [G, out, r], and every low-rank product is a batched one over `groups` of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .dropout import Mask, kept_share, masked, masked_input
from .gain import add_gain, gradient_of_gain, times_gain
from .groups import add_product, gradient_of_B, groups, product
from .summed import summed_weight

# Up to this size of a linear's input and output together, in elements, torch's own nodes are faster than ours, which is
# called from Python: a step of a UNet with 32 linears of 64 to 256 rows, 32 to 96 wide, takes 0.90 of the time. One of
# 1,024 rows, 64 -> 512, takes 1.4 times.
FEW = 1 << 17


class Projection(NamedTuple):
    """One frozen linear and its update. A and B are None without an update, and have three axes for groups of rows.
    h: the gain, [out] or, for groups, [G, out].
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    scale: float
    h: Tensor | None = None


Tensors = tuple[Tensor | None, ...]  # W, bias, A, B of each projection in turn


def reference(
    x: Tensor, projections: Sequence[Projection], keep: Tensor | None = None, share: float = 1.0
) -> tuple[Tensor, ...]:
    """Compute the equation. `keep`: the dropout mask (1 kept, 0 dropped); `share`: the share of elements kept."""
    dropped = x if keep is None else x * keep / share
    return tuple(
        _reference_base(x, p)
        + (0 if p.A is None or p.B is None else F.linear(F.linear(dropped, p.A.to(x.dtype)), p.B.to(x.dtype)) * p.scale)
        for p in projections
    )


def _reference_base(x: Tensor, p: Projection) -> Tensor:
    return F.linear(x, p.W if p.h is None else p.W * (1 + p.h.to(x.dtype)).unsqueeze(-1), p.bias)


def project(x: Tensor, projection: Projection, mask: Mask | None = None) -> Tensor:
    """Compute one projection of x [..., in]: [..., out]. `mask`: the update's dropout. W and bias get no gradient."""
    W, bias, A, B, scale, h = projection
    if mask is None and A is not None and B is not None and A.dim() == 2:
        summed = summed_weight(x, x.shape[-1], W, A, B, scale, h)
        if summed is not None:
            return F.linear(x, summed, bias)
        if x.numel() * (1 + W.shape[0] / W.shape[1]) <= FEW:
            rows = x.reshape(-1, x.shape[-1])
            down = rows @ A.to(x.dtype).T
            out = F.linear(rows, W, bias)
            out = torch.addmm(out if h is None else add_gain(out, out, h, bias), down, B.to(x.dtype).T, alpha=scale)
            return out.view(*x.shape[:-1], W.shape[0])
    return _Project.apply(x, mask.p if mask else 0.0, mask.state if mask else None, scale, W, bias, A, B, h)


def flat(projections: Sequence[Projection]) -> Tensors:
    """List the projections' tensors, as autograd functions take them."""
    return tuple(t for p in projections for t in p[:4])


def unflat(tensors: Sequence[Tensor | None], scales: Sequence[float], dropout: float = 0.0) -> list[Projection]:
    """Rebuild the projections; their scales include dropout's division by the kept share."""
    share, found = kept_share(dropout), []
    for i, scale in enumerate(scales):
        W, bias, A, B = tensors[4 * i : 4 * i + 4]
        assert W is not None
        found.append(Projection(W, bias, A, B, scale / share))
    return found


def forward(
    x: Tensor, dropped: Tensor, projections: Sequence[Projection], linears: list[Tensor | None] | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Return the outputs [N, out_i] and the low-rank products, concatenated to [N, Σ r]. x and dropped: [N, in].

    linears: gets what each gain multiplies, x W_iᵀ; None without a gain.
    """
    outs = []
    for p in projections:
        out, linear = F.linear(x, p.W, p.bias), None
        if p.h is not None:
            linear = out if p.bias is None else out - p.bias
            out = torch.addcmul(out, linear, p.h.to(out.dtype))
        outs.append(out)
        if linears is not None:
            linears.append(linear)
    factors = _stacked(projections, x.dtype)
    if factors is None:
        return outs, None
    down = groups(dropped, factors) @ factors.mT  # [N, Σ r]
    for out, part, p in zip(outs, _parts(down, projections), projections):
        if part is not None and p.B is not None:
            add_product(out, part, p.B.to(x.dtype).mT, p.scale)
    return outs, down


class NeedsGrad(NamedTuple):
    """Which gradients are needed: of x, and of each projection's A and B."""

    x: bool
    A: list[bool]
    B: list[bool]

    @classmethod
    def of(cls, x: bool, needs: Sequence[bool]) -> NeedsGrad:
        """Read autograd's flags for W, bias, A, B of each projection."""
        return cls(x, list(needs[2::4]), list(needs[3::4]))


def backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    dropped: Tensor | None,
    mask: Mask | None,
    down: Tensor | None,
    projections: Sequence[Projection],
    needs: NeedsGrad,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, and those of W, bias, A, B of each projection (None for W and bias), but not of gains.

    grads: [N, out_i], dropped: x after dropout, down: the low-rank products of `forward`.
    """
    dtype = grads[0].dtype
    inner = None
    if needs.x or any(needs.A):
        inners = [
            product(groups(g, p.B), p.B.to(dtype), p.scale) for g, p in zip(grads, projections) if p.B is not None
        ]
        inner = inners[0] if len(inners) == 1 else torch.cat(inners, dim=-1) if inners else None  # [N, Σ r]
    # [Σ r, in]
    dA = inner.mT @ groups(dropped, inner) if inner is not None and dropped is not None and any(needs.A) else None
    gradients: list[Tensor | None] = []
    parts = zip(
        _parts(dA, projections, dim=-2), _parts(down, projections), grads, projections, needs.A, needs.B, strict=True
    )
    for dA_part, down_part, g, p, needs_A, needs_B in parts:
        of_A = of_B = None
        if needs_A and dA_part is not None and p.A is not None:
            of_A = dA_part.to(p.A.dtype)
        if needs_B and down_part is not None and p.B is not None:
            of_B = gradient_of_B(down_part, g, p.B.dtype).mul_(p.scale)
        gradients += [None, None, of_A, of_B]
    if not needs.x:
        return None, gradients
    gained = [g if p.h is None else times_gain(g, p.h) for g, p in zip(grads, projections)]
    dx = gained[0] @ projections[0].W  # [N, in]; later terms are added to this buffer
    for g, p in zip(gained[1:], projections[1:]):
        dx.addmm_(g, p.W)
    if inner is not None:
        factors = _stacked(projections, dtype)
        assert factors is not None
        if mask is None:
            add_product(dx, inner, factors)
        else:
            dx.add_(masked((inner @ factors).view_as(dx), mask))
    return dx, gradients


def _stacked(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    """Concatenate all A to [Σ r, in]; None if there are none."""
    factors = [p.A.to(dtype) for p in projections if p.A is not None]
    return factors[0] if len(factors) == 1 else torch.cat(factors, dim=-2) if factors else None


def _parts(stacked: Tensor | None, projections: Sequence[Projection], dim: int = -1) -> list[Tensor | None]:
    """Split a concatenation into the projections' parts, None for those without an update."""
    if stacked is None:
        return [None] * len(projections)
    pieces = iter(stacked.split([p.A.shape[-2] for p in projections if p.A is not None], dim))
    return [None if p.A is None else next(pieces) for p in projections]


def _rows(t: Tensor, h: Tensor) -> Tensor:
    """Return t [N, out] as [G, N / G, out] if h has groups, [G, out]."""
    return t if h.dim() == 1 else t.view(h.shape[0], -1, t.shape[-1])


def _per_row(h: Tensor) -> Tensor:
    """Return h in a shape that broadcasts to `_rows`."""
    return h if h.dim() == 1 else h.unsqueeze(1)


class _Project(torch.autograd.Function):
    """One projection, without lists: it runs for every adapted linear, and lists would be a tenth of its overhead."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, state: Tensor | None, scale: float, W, bias, A, B, h) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        out = F.linear(x2, W, bias)  # [N, out]
        linear = None
        if h is not None:
            linear = out if bias is None else out - bias
            out = torch.addcmul(_rows(out, h), _rows(linear, h), _per_row(h).to(out.dtype)).view_as(out)
        scale = scale / kept_share(p) if p else scale
        down = None
        needs_x, needs_A, needs_B = ctx.needs_input_grad[0], ctx.needs_input_grad[6], ctx.needs_input_grad[7]
        if A is not None:
            kept = masked_input(x2, None if state is None else Mask(p, state))
            down = product(groups(kept, A), A.to(x.dtype).mT, scale)  # [N, r]
            add_product(out, down, B.to(x.dtype).mT)
        ctx.p, ctx.scale, ctx.shape = p, scale, x.shape
        needs_mask = state is not None and (needs_x or needs_A)
        ctx.save_for_backward(
            x2 if needs_A else None,
            state if needs_mask else None,
            down if needs_B else None,
            W,
            A,
            B,
            h,
            linear if ctx.needs_input_grad[8] else None,
        )
        # Not a view: callers may modify a linear's output in place, which autograd refuses for a node's views.
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, state, down, W, A, B, h, linear = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad[0], ctx.needs_input_grad[6], ctx.needs_input_grad[7]
        g = g.reshape(-1, g.shape[-1])
        mask = None if state is None else Mask(ctx.p, state)
        dA = dB = dh = None
        if linear is not None:
            dh = gradient_of_gain(_rows(g, h), _rows(linear, h), _per_row(h)).view_as(h)
        dx = None
        if needs_x:  # [N, in]; later terms are added to this buffer
            dx = (g if h is None else times_gain(_rows(g, h), _per_row(h)).view_as(g)) @ W
        if B is not None and (needs_x or needs_A):
            inner = groups(g, B) @ B.to(g.dtype)  # [N, r]
            if needs_A:
                dA = product(inner.mT, groups(masked_input(x, mask), inner), ctx.scale).to(A.dtype)
            if dx is not None:
                if mask is None:
                    add_product(dx, inner, A.to(g.dtype), ctx.scale)
                else:
                    dx.add_(masked(product(inner, A.to(g.dtype), ctx.scale).view_as(dx), mask))
        if needs_B:
            dB = gradient_of_B(down, g, B.dtype)
        return dx.view(ctx.shape) if dx is not None else None, None, None, None, None, None, dA, dB, dh
