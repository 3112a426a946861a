"""Training on a batch whose rows have adapters of their own: low-rank updates of runs of equal rows, as one autograd
node.

For any rows: mixes of adapters, the base's, runs of other lengths. Where each adapter has as many rows as the next, see
`groups`.

    y[n] = x[n] Wᵀ + b + Σ_k s[n, k] · (x[n] A_kᵀ) B_kᵀ        (see `stacked.reference`; s is weight times scale)

The base's GEMM runs once over all rows, if its weight is frozen; each segment's update is added into the same buffer.
Kept for backward are x and the [n, r] products.
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
    tokens: slice
    used: Row


class Segments(NamedTuple):
    """How `add_segments` goes through a batch. `order`: all rows, sorted; None for as they are. `mark`: see
    `add_segments`.
    """

    order: Tensor | None
    parts: list[Segment]
    mark: Tensor


def segments(rows: Sequence[Row], tokens: int, like: Tensor) -> Segments:
    """Runs of equal rows for `add_segments`, brought together where they are short. `tokens` of each row."""
    order = list(range(len(rows)))
    if not in_place(rows, tokens):
        first = {row: n for n, row in reversed(list(enumerate(rows)))}
        order.sort(key=lambda n: (not rows[n], first[rows[n]]))  # the base's last
    parts: list[Segment] = []
    for place, n in enumerate(order):
        start = parts.pop().tokens.start if parts and parts[-1].used == rows[n] else place * tokens
        parts.append(Segment(slice(start, (place + 1) * tokens), rows[n]))
    moved = torch.tensor(order, device=like.device) if order != sorted(order) else None
    return Segments(moved, [part for part in parts if part.used], like.new_empty(0, len(rows), tokens, 7))


def add_segments(
    y: Tensor | None,
    x: Tensor,
    W: Tensor | None,
    bias: Tensor | None,
    how: Segments,
    factors: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """y (written into), or x Wᵀ + b for a W and bias that take no gradient, with the segments' updates. Gradients for
    y, x and factors.

    What it keeps for backward includes `how.mark`, an empty tensor of a shape that nothing else has: gradient
    checkpointing compares what the first run and the run in backward keep, and so notices if the second one was not
    routed.
    """
    return _AddSegments.apply(y, x, W, bias, how, *(t for pair in factors for t in pair))


def _gather(x: Tensor, order: Tensor | None) -> Tensor:
    """x: [N, in] with its rows (of N / rows tokens) in this order."""
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
        ctx, y: Tensor | None, x: Tensor, W: Tensor | None, bias: Tensor | None, how: Segments, *factors: Tensor
    ) -> Tensor:
        x2 = _gather(x.reshape(-1, x.shape[-1]), how.order)
        if y is None:
            assert W is not None
            update = F.linear(x2, W, bias)  # [N, out]
        else:
            ctx.mark_dirty(y)
            x2 = x2.to(y.dtype)
            update = y.view(-1, y.shape[-1]) if how.order is None else y.new_zeros(x2.shape[0], y.shape[-1])
        cast = [f.to(update.dtype) for f in factors]
        downs = []  # each x Aᵀ: [n, r]
        for tokens, used in how.parts:
            for k, scale in used:
                downs.append(x2[tokens] @ cast[2 * k].T)
                update[tokens].addmm_(downs[-1], cast[2 * k + 1].T, alpha=scale)
        ctx.how, ctx.shape, ctx.dtype, ctx.count = how, x.shape, x.dtype, len(factors)
        needed = ctx.needs_input_grad
        ctx.save_for_backward(x2 if any(needed[5::2]) else None, W if needed[1] else None, how.mark, *factors, *downs)
        if y is None:
            return _scatter(update, how.order).view(*x.shape[:-1], update.shape[-1])
        return y if how.order is None else y.add_(_scatter(update, how.order).view_as(y))

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x2, W, _, *kept = ctx.saved_tensors
        factors, downs = kept[: ctx.count], kept[ctx.count :]
        needs_y, needs_x, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5:]
        g2 = _gather(g.reshape(-1, g.shape[-1]), ctx.how.order)
        dx = None
        if needs_x:
            # One [N, in] buffer: the base's input gradient, then the updates' added into it.
            dx = g2 @ W if W is not None else g2.new_zeros(g2.shape[0], ctx.shape[-1])
        gradients = _backward(g2, dx, x2, factors, downs, ctx.how, needed)
        if dx is not None:
            dx = _scatter(dx, ctx.how.order).view(ctx.shape).to(ctx.dtype)
        return g if needs_y else None, dx, None, None, None, *gradients


def _backward(
    g: Tensor,
    dx: Tensor | None,
    x: Tensor | None,
    factors: Sequence[Tensor],
    downs: Sequence[Tensor],
    how: Segments,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The factors' gradients; the input's is added into dx."""
    cast, left = [f.to(g.dtype) for f in factors], iter(downs)
    gradients: list[Tensor | None] = [None] * len(factors)
    for tokens, used in how.parts:
        rows = g[tokens]
        for k, scale in used:
            down = next(left)
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
    """Add scale · change, in the factor's own precision."""
    done = gradients[k]
    gradients[k] = change.to(factors[k].dtype).mul_(scale) if done is None else done.add_(change, alpha=scale)
