"""Train on a batch that mixes adapters: the low-rank updates of runs of equal rows, as one autograd node.

For any batch: rows that mix adapters, rows on the base, runs of unequal length. If all adapters have equally many rows,
`groups` is faster.

    y[n] = x[n] Wᵀ + b + Σ_k s[n, k] · (x[n] A_kᵀ) B_kᵀ        (see `stacked.reference`; s is weight times scale)

The base's GEMM runs once over all rows, if its weight is frozen; each segment's update is added to the same buffer.
Saved for backward are x and the [n, r] products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import without_autocast
from .schedule import Row, in_place


class Segment(NamedTuple):
    """Adjacent tokens with the same adapters."""

    tokens: slice
    used: Row


class Segments(NamedTuple):
    """A batch's segments. `order`: the rows' order, None if they stay in place; `mark`: see `add_segments`."""

    order: Tensor | None
    parts: list[Segment]
    mark: Tensor


def segments(rows: Sequence[Row], tokens: int, like: Tensor) -> Segments:
    """Divide rows of `tokens` tokens each into segments, gathering equal rows if their runs are short."""
    order = list(range(len(rows)))
    if not in_place(rows, tokens):
        first = {row: n for n, row in reversed(list(enumerate(rows)))}
        order.sort(key=lambda n: (not rows[n], first[rows[n]]))  # rows on the base last
    parts: list[Segment] = []
    for position, n in enumerate(order):
        start = parts.pop().tokens.start if parts and parts[-1].used == rows[n] else position * tokens
        parts.append(Segment(slice(start, (position + 1) * tokens), rows[n]))
    moved = torch.tensor(order, device=like.device) if order != sorted(order) else None
    return Segments(moved, [part for part in parts if part.used], like.new_empty(0, len(rows), tokens, 7))


def add_segments(
    y: Tensor | None,
    x: Tensor,
    W: Tensor | None,
    bias: Tensor | None,
    plan: Segments,
    factors: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Add the segments' updates to y in place, or to x Wᵀ + b (y None). Returns the sum, [..., out].

    x: [..., in]; `factors`: A, B of each adapter. y, x and the factors get gradients; W and the bias do not. The saved
    tensors include `plan.mark`, an empty one of a unique shape: gradient checkpointing compares those of the two
    forwards, and so raises an error if the second one runs outside `route`.
    """
    return _AddSegments.apply(y, x, W, bias, plan, *(t for pair in factors for t in pair))


def _gather(x: Tensor, order: Tensor | None) -> Tensor:
    """Return x [N, in] with its rows (of N / rows tokens each) in this order."""
    return x if order is None else x.reshape(order.shape[0], -1).index_select(0, order).view_as(x)


def _scatter(x: Tensor, order: Tensor | None) -> Tensor:
    return (
        x
        if order is None
        else torch.empty_like(x).view(order.shape[0], -1).index_copy_(0, order, x.view(order.shape[0], -1)).view_as(x)
    )


class _AddSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, y: Tensor | None, x: Tensor, W: Tensor | None, bias: Tensor | None, plan: Segments, *factors: Tensor
    ) -> Tensor:
        x2 = _gather(x.reshape(-1, x.shape[-1]), plan.order)
        if y is None:
            assert W is not None
            update = F.linear(x2, W, bias)  # [N, out]
        else:
            ctx.mark_dirty(y)
            x2 = x2.to(y.dtype)
            update = y.view(-1, y.shape[-1]) if plan.order is None else y.new_zeros(x2.shape[0], y.shape[-1])
        cast = [f.to(update.dtype) for f in factors]
        downs = []  # each x Aᵀ: [n, r]
        for tokens, used in plan.parts:
            for k, scale in used:
                downs.append(x2[tokens] @ cast[2 * k].T)
                update[tokens].addmm_(downs[-1], cast[2 * k + 1].T, alpha=scale)
        ctx.plan, ctx.shape, ctx.dtype, ctx.count = plan, x.shape, x.dtype, len(factors)
        needed = ctx.needs_input_grad
        ctx.save_for_backward(x2 if any(needed[5::2]) else None, W if needed[1] else None, plan.mark, *factors, *downs)
        if y is None:
            return _scatter(update, plan.order).view(*x.shape[:-1], update.shape[-1])
        return y if plan.order is None else y.add_(_scatter(update, plan.order).view_as(y))

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x2, W, _, *kept = ctx.saved_tensors
        factors, downs = kept[: ctx.count], kept[ctx.count :]
        needs_y, needs_x, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5:]
        g2 = _gather(g.reshape(-1, g.shape[-1]), ctx.plan.order)
        dx = None
        if needs_x:
            # One [N, in] buffer: the base's input gradient, to which those of the updates are added.
            dx = g2 @ W if W is not None else g2.new_zeros(g2.shape[0], ctx.shape[-1])
        gradients = _backward(g2, dx, x2, factors, downs, ctx.plan, needed)
        if dx is not None:
            dx = _scatter(dx, ctx.plan.order).view(ctx.shape).to(ctx.dtype)
        return g if needs_y else None, dx, None, None, None, *gradients


def _backward(
    g: Tensor,
    dx: Tensor | None,
    x: Tensor | None,
    factors: Sequence[Tensor],
    downs: Sequence[Tensor],
    plan: Segments,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the factors' gradients, and add the input's to dx."""
    cast, remaining = [f.to(g.dtype) for f in factors], iter(downs)
    gradients: list[Tensor | None] = [None] * len(factors)
    for tokens, used in plan.parts:
        rows = g[tokens]
        for k, scale in used:
            down = next(remaining)
            if needed[2 * k + 1]:
                _accumulate(gradients, 2 * k + 1, rows.T @ down, factors, scale)
            if dx is not None or needed[2 * k]:
                inner = rows @ cast[2 * k + 1]  # [n, r]
                if needed[2 * k]:
                    assert x is not None
                    _accumulate(gradients, 2 * k, inner.T @ x[tokens], factors, scale)
                if dx is not None:
                    dx[tokens].addmm_(inner, cast[2 * k], alpha=scale)
    return gradients


def _accumulate(
    gradients: list[Tensor | None], k: int, change: Tensor, factors: Sequence[Tensor], scale: float
) -> None:
    """Add scale · change to factor k's gradient, in the factor's own precision."""
    total = gradients[k]
    gradients[k] = change.to(factors[k].dtype).mul_(scale) if total is None else total.add_(change, alpha=scale)
