"""Products of tokens with the matrices of the experts that they were routed to (Shazeer et al. 2017).

    y[i] = W[e(i)] x[i]        x: [S, in]   W: [E, out, in], or [E, in, out] if transposed   y: [S, out]

S counts pairs of a token and an expert, sorted by expert, so that each expert's pairs are adjacent. A low-rank update
is two such products, with A [E, r, in] and B [E, out, r]: no expert's W + ΔW is ever computed.

`reference` is that line; `product` computes the same, one matrix product for each expert that has tokens, as one
autograd node that keeps x only if W is trained, and W only by reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import needs_plain

Bounds = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Routed:
    """Pairs of a token and an expert, sorted by expert: `token` and `expert` [S]; `order` [S]: the position of each
    pair before sorting. `bounds`: (expert, start, stop) of each expert that has pairs; a pair behind the last one is
    another process's (its expert is E) and gets zeros.
    """

    token: Tensor
    expert: Tensor
    order: Tensor
    bounds: Bounds

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Routed:
        """Sort the choices of a router. `index`: [tokens, k], each token's experts; `experts`: E."""
        flat = index.reshape(-1)
        expert, order = torch.sort(flat, stable=True)
        token = torch.div(order, index.shape[-1], rounding_mode="floor")
        return cls(token, expert.clamp(max=experts - 1), order, _bounds(flat, experts))

    def of_pairs(self, chosen: Tensor) -> Routed:
        """Return only some of the pairs. `chosen`: their indices [n], ascending."""
        expert, last = self.expert[chosen], self.bounds[-1][2] if self.bounds else 0
        counted = expert[chosen < last]
        return Routed(self.token[chosen], expert, chosen, _bounds(counted, int(expert.max()) + 1 if len(expert) else 0))

    def summed(self, y: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts: [tokens, out]. y: [S, out], sorted; `weights`: [tokens, k],
        as the router gave them.
        """
        tokens, k = weights.shape
        weighted = y * weights.reshape(-1)[self.order].unsqueeze(-1)
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(self.order), device=y.device)
        # A sum over adjacent rows, not index_add_, which adds in another order each time on a GPU.
        return weighted[back].view(tokens, k, -1).sum(dim=1)


def _bounds(expert: Tensor, experts: int) -> Bounds:
    """Return (expert, start, stop) of those that occur. On the meta device, where no values are, all equally often."""
    if expert.is_meta:
        share = -(-expert.numel() // max(experts, 1))
        counts = [max(0, min(share, expert.numel() - i * share)) for i in range(experts)]
    else:
        counts = torch.bincount(expert, minlength=experts)[:experts].tolist()
    found, start = [], 0
    for e, count in enumerate(counts):
        if count:
            found.append((e, start, start + count))
            start += count
    return tuple(found)


def reference(x: Tensor, W: Tensor, expert: Tensor, transposed: bool = False) -> Tensor:
    """Return W[e(i)] x[i]: [S, out]. It copies a matrix for each pair."""
    own = W.to(x.dtype)[expert]
    return torch.bmm(x.unsqueeze(1), own if transposed else own.mT).squeeze(1)


def product(x: Tensor, W: Tensor, routed: Routed, transposed: bool = False) -> Tensor:
    """Return W[e(i)] x[i], [S, out], in x's dtype. `transposed`: W is [E, in, out]."""
    if needs_plain():
        return _plain(x, W, routed.bounds, transposed)
    out: Tensor = _Product.apply(x, W, routed.bounds, transposed)
    return out


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float, routed: Routed) -> Tensor:
    """Return s · B[e(i)] A[e(i)] x[i]: [S, out]. x: [S, in]   A: [E, r, in]   B: [E, out, r]."""
    down = product(x, A, routed)  # [S, r]
    return product(down if scale == 1 else down * scale, B, routed)


def _plain(x: Tensor, W: Tensor, bounds: Bounds, transposed: bool) -> Tensor:
    """The same of torch's own operations."""
    own = W.to(x.dtype)
    parts = [x[start:stop] @ (own[e] if transposed else own[e].T) for e, start, stop in bounds]
    rest = len(x) - (bounds[-1][2] if bounds else 0)
    size_out = W.shape[2 if transposed else 1]
    return torch.cat([*parts, x.new_zeros(rest, size_out)]) if rest or not parts else torch.cat(parts)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bounds: Bounds, transposed: bool) -> Tensor:
        size_out = W.shape[2 if transposed else 1]
        y = x.new_empty(len(x), size_out)
        for e, start, stop in bounds:
            own = W[e].to(x.dtype)
            torch.mm(x[start:stop], own if transposed else own.T, out=y[start:stop])
        y[bounds[-1][2] if bounds else 0 :] = 0
        ctx.bounds, ctx.transposed = bounds, transposed
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, W = ctx.saved_tensors
        needs_x, needs_W, *_ = ctx.needs_input_grad
        transposed, last = ctx.transposed, ctx.bounds[-1][2] if ctx.bounds else 0
        g = g.contiguous()
        gx = g.new_empty(len(g), W.shape[1 if transposed else 2]) if needs_x else None
        gW = torch.zeros_like(W) if needs_W else None  # experts without tokens have no gradient
        for e, start, stop in ctx.bounds:
            own, of_y = W[e].to(g.dtype), g[start:stop]
            if gx is not None:
                torch.mm(of_y, own.T if transposed else own, out=gx[start:stop])
            if gW is not None:
                of_x = x[start:stop]
                gW[e] = of_x.T @ of_y if transposed else of_y.T @ of_x
        if gx is not None:
            gx[last:] = 0
        return gx, gW, None, None
