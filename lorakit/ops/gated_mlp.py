"""The gated feed-forward block (Shazeer 2020, SwiGLU) with low-rank updates on its three linears, as one autograd node.

    y = down(act(gate(x)) · up(x))        x: [..., in]   gate(x), up(x): [..., ffn]

Kept for backward: x, gate(x), up(x) and the [N, r] products. act(gate) and act(gate) · up, which autograd would keep too, are made
again: elementwise work only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import projections as p
from .autocast import without_autocast
from .dropout import draw_seed, keep_mask, masked
from .projections import Projection, Wanted


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its backward, (gradient, input) -> gradient, which may write into the gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(g, x, grad_input=g)


def _gelu_tanh_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(g, x, approximate="tanh", grad_input=g)


SILU = Activation(F.silu, _silu_backward)
GELU_TANH = Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_backward)


def reference(x: Tensor, gate: Projection, up: Projection, down: Projection, act: Activation) -> Tensor:
    """The equation."""
    return p.reference(act.forward(p.reference(x, [gate])[0]) * p.reference(x, [up])[0], [down])[0]


def gated_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, act: Activation, dropout: float = 0.0) -> Tensor:
    """down(act(gate(x)) · up(x)). `dropout` is that of the updates: one mask for gate and up, another for down."""
    seeds = (draw_seed(), draw_seed()) if dropout else (0, 0)
    three = [gate, up, down]
    return _GatedMlp.apply(x, act, dropout, seeds, [t.scale for t in three], *p.flat(three))


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, act: Activation, dropout: float, seeds: tuple[int, int], scales: list[float], *tensors: Tensor | None):
        x2 = x.reshape(-1, x.shape[-1])
        gate_up, down = _split(tensors, scales, dropout)
        (gated, lifted), low = p.forward(x2, _dropped(x2, dropout, seeds[0]), gate_up)
        h = act.forward(gated).mul_(lifted)  # [N, ffn]
        (out,), low_down = p.forward(h, _dropped(h, dropout, seeds[1]), down)
        needs = ctx.needs_input_grad[5:]
        ctx.wanted = Wanted.of(ctx.needs_input_grad[0], needs[:8])
        ctx.wanted_down = Wanted.of(ctx.wanted.x or any(needs[:8]), needs[8:])
        ctx.act, ctx.dropout, ctx.seeds, ctx.scales, ctx.shape = act, dropout, seeds, scales, x.shape
        ctx.save_for_backward(x2, gated, lifted, low, low_down, *tensors)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, gated, lifted, low, low_down, *tensors = ctx.saved_tensors
        gate_up, down = _split(tensors, ctx.scales, ctx.dropout)
        a = ctx.act.forward(gated)
        h = a * lifted
        mask = keep_mask(h, ctx.dropout, ctx.seeds[1]) if ctx.dropout else None
        dropped = h if mask is None else masked(h, mask)
        dh, gradients_down = p.backward([g.reshape(-1, g.shape[-1])], h, dropped, mask, low_down, down, ctx.wanted_down)
        if dh is None:
            return (None, None, None, None, None, *[None] * 8, *gradients_down)
        del h, dropped, mask
        d_lifted = a.mul_(dh)
        d_gated = ctx.act.backward(dh.mul_(lifted), gated)
        mask = keep_mask(x, ctx.dropout, ctx.seeds[0]) if ctx.dropout else None
        dropped = x if mask is None else masked(x, mask)
        dx, gradients = p.backward([d_gated, d_lifted], x, dropped, mask, low, gate_up, ctx.wanted)
        return (dx.view(ctx.shape) if dx is not None else None, None, None, None, None, *gradients, *gradients_down)


def _split(tensors, scales: list[float], dropout: float) -> tuple[list[Projection], list[Projection]]:
    three = p.unflat(tensors, scales, dropout)
    return three[:2], three[2:]


def _dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    return masked(x, keep_mask(x, dropout, seed)) if dropout else x
