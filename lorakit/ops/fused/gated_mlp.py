"""The gated feed-forward block (Shazeer 2020, SwiGLU) with low-rank updates on its three linears, as one autograd node.

    y = down(act(gate(x)) · up(x))        x: [..., in]   gate(x), up(x): [..., ffn]

Saved for backward: x, gate(x), up(x) and the [N, r] products. act(gate) and act(gate) · up, which autograd would save
too, are recomputed: elementwise work only.

The gradient of a gain h needs x Wᵀ besides (see `projections`). Of gate and up it follows from their outputs o, of down
it is saved:

    Σ G ∘ (x Wᵀ) = (Σ G ∘ (o - b) - Σ_r B ∘ dB) / (1 + h)        G: the gradient of o, s · B A x = o - b - (1 + h) x Wᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import projections as p
from ..autocast import without_autocast
from ..dropout import Mask, draw_mask, draw_seed, has_no_values, masked
from ..gain import gradient_of_gain
from ..projections import NeedsGrad, Projection

# Below this |1 + h| an output no longer shows x Wᵀ, which is then saved.
SMALLEST_FACTOR = 0.1


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its backward (gradient, input) -> gradient, which may overwrite the gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(g, x, grad_input=g)


def _gelu(approximate: str) -> Activation:
    def backward(g: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward.grad_input(g, x, approximate=approximate, grad_input=g)

    return Activation(lambda x: F.gelu(x, approximate=approximate), backward)


SILU, GELU, GELU_TANH = Activation(F.silu, _silu_backward), _gelu("none"), _gelu("tanh")
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}


def reference(x: Tensor, gate_up: Sequence[Projection], down: Projection, act: Activation) -> Tensor:
    """Compute the equation. `gate_up`: gate and up, or one projection with the outputs of both, gate's first."""
    gate, up = _halves(p.reference(x, gate_up))
    return p.reference(act.forward(gate) * up, [down])[0]


def gated_mlp(
    x: Tensor,
    gate_up: Sequence[Projection],
    down: Projection,
    act: Activation,
    mask: Mask | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute down(act(gate(x)) · up(x)): [..., out]. `gate_up`: as in `reference`.

    `dropout`: the updates' probability; `mask`: of x, if gate or up have an update. That of down's input is drawn here,
    as no other module reads it.
    """
    projections = [*gate_up, down]
    seed = draw_seed() if dropout and down.A is not None else None
    gains = [t.h for t in projections]
    shown = all(h is None or _is_shown(h) for h in gains[:-1])
    scales = [t.scale for t in projections]
    return _GatedMlp.apply(
        x, act, dropout, mask.state if mask else None, seed, scales, shown, *p.flat(projections), *gains
    )


def _is_shown(h: Tensor) -> bool:
    """Whether outputs with this gain show x Wᵀ. Elsewhere than on a CPU the question would make the device wait."""
    return has_no_values(h) or (h.device.type == "cpu" and bool(((1 + h.detach()).abs() >= SMALLEST_FACTOR).all()))


def _halves(outs: Sequence[Tensor]) -> Sequence[Tensor]:
    return outs[0].chunk(2, dim=-1) if len(outs) == 1 else outs


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        act: Activation,
        dropout: float,
        state: Tensor | None,
        seed: int | None,
        scales: list[float],
        shown: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        *gate_up, down = _unflat(tensors, scales, dropout)
        count = 4 * len(scales)
        needs, needs_gains = ctx.needs_input_grad[7:][:count], ctx.needs_input_grad[7 + count :]
        linears: list[Tensor | None] = []
        outs, low = p.forward(x2, _dropped(x2, dropout, state), gate_up, linears)
        if shown and all(needs_B or not needs_h for needs_B, needs_h in zip(needs[3::4], needs_gains, strict=True)):
            linears = [None] * len(gate_up)
        gate, up = _halves(outs)
        h = act.forward(gate).mul_(up)  # [N, ffn]
        state_of_h = draw_mask(h, dropout, seed).state if seed is not None else None
        (out,), low_down = p.forward(h, _dropped(h, dropout, state_of_h), [down], linears)
        ctx.needs_gains = needs_gains
        ctx.needs = NeedsGrad.of(ctx.needs_input_grad[0], needs[:-4])
        ctx.needs_down = NeedsGrad.of(ctx.needs.x or any(needs[:-4]) or any(needs_gains[:-1]), needs[-4:])
        ctx.act, ctx.dropout, ctx.scales, ctx.shape = act, dropout, scales, x.shape
        kept = [linear if needed else None for linear, needed in zip(linears, needs_gains, strict=True)]
        ctx.save_for_backward(x2, low, low_down, state, state_of_h, *kept, *outs, *tensors)
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))  # not a view, see `projections`

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, low, low_down, state, state_of_h, *saved = ctx.saved_tensors
        count = len(ctx.scales) - 1  # of gate and up: 2, or 1 if packed
        linears, saved = saved[: count + 1], saved[count + 1 :]
        outs, (*gate_up, down) = saved[:count], _unflat(saved[count:], ctx.scales, ctx.dropout)
        gate, up = _halves(outs)
        a = ctx.act.forward(gate)
        h = a * up
        mask = None if state_of_h is None else Mask(ctx.dropout, state_of_h)
        dropped = _dropped(h, ctx.dropout, state_of_h)
        g = g.reshape(-1, g.shape[-1])
        dh, gradients_down = p.backward([g], h, dropped, mask, low_down, [down], ctx.needs_down)
        of_gains: list[Tensor | None] = [None] * (count + 1)
        if ctx.needs_gains[-1]:
            of_gains[-1] = gradient_of_gain(g, linears[-1], _gain(down))
        if dh is None:
            return (*[None] * (7 + 4 * count), *gradients_down, *of_gains)
        del h, dropped
        d_up = a.mul_(dh)
        d_gate = ctx.act.backward(dh.mul_(up), gate)
        grads = [d_gate, d_up] if count == 2 else [torch.cat([d_gate, d_up], dim=-1)]
        mask = None if state is None else Mask(ctx.dropout, state)
        dx, gradients = p.backward(grads, x, _dropped(x, ctx.dropout, state), mask, low, gate_up, ctx.needs)
        for i, (grad, linear) in enumerate(zip(grads, linears)):
            if not ctx.needs_gains[i]:
                continue
            if linear is None:
                of_gains[i] = _from_output(grad, outs[i], gate_up[i], gradients[4 * i + 3])
            else:
                of_gains[i] = gradient_of_gain(grad, linear, _gain(gate_up[i]))
        dx = dx.view(ctx.shape) if dx is not None else None
        return (dx, *[None] * 6, *gradients, *gradients_down, *of_gains)


def _unflat(tensors: Sequence[Tensor | None], scales: Sequence[float], dropout: float) -> list[Projection]:
    """Rebuild the projections from their tensors, the gains last."""
    gains = tensors[4 * len(scales) :]
    rebuilt = p.unflat(tensors[: 4 * len(scales)], scales, dropout)
    return [one._replace(h=h) for one, h in zip(rebuilt, gains, strict=True)]


def _gain(projection: Projection) -> Tensor:
    assert projection.h is not None
    return projection.h


def _from_output(g: Tensor, out: Tensor, projection: Projection, dB: Tensor | None) -> Tensor:
    """Return the gradient of a gain from the projection's output and the gradients of the output and of B."""
    h, bias, B = _gain(projection), projection.bias, projection.B
    total = gradient_of_gain(g, out if bias is None else out - bias, h)
    if dB is not None and B is not None:
        total = total - (dB * B).sum(1)
    return total / (1 + h)


def _dropped(x: Tensor, p: float, state: Tensor | None) -> Tensor:
    return x if state is None else masked(x, Mask(p, state))
