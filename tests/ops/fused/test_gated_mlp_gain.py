"""The gated MLP whose projections have gains (DoRA): the plain lines' values and gradients, and what is kept."""

from __future__ import annotations

import pytest
import torch
from against import gradients, kept, mask_of, projection, randn
from torch import Tensor

from lorakit.ops.fused import gated_mlp as ops
from lorakit.ops.fused.gated_mlp import SILU
from lorakit.ops.projections import Projection

IN, FFN, ROWS = 6, 7, 15


def linears(packed: bool, bias: bool, least: float = 0.5, gained: str = "gud", dtype=torch.float64) -> list[Projection]:
    """gate, up and down (or the first two in one); those that `gained` names have gains, |1 + h| at least `least`."""
    sizes = {"gu": (IN, 2 * FFN), "d": (FFN, IN)} if packed else {"g": (IN, FFN), "u": (IN, FFN), "d": (FFN, IN)}
    made = []
    for i, (name, size) in enumerate(sizes.items()):
        one = projection(*size, 2 + i, bias, seed=10 * i, scale=0.5 + i)
        factor = randn(size[1], seed=70 + i)
        factor = factor.sign() * (factor.abs() + least)
        factor[0] = least
        h = (factor - 1).to(dtype).requires_grad_() if set(name) & set(gained) else None
        A, B = (None if t is None else t.to(dtype).requires_grad_() for t in (one.A, one.B))
        b = None if one.bias is None else one.bias.to(dtype)
        made.append(Projection(one.W.to(dtype), b, A, B, one.scale, h))
    return made


def wanted(x: Tensor, mlp: list[Projection]) -> list[Tensor]:
    return [t for t in [x, *(t for p in mlp for t in (p.A, p.B, p.h))] if t is not None and t.requires_grad]


@pytest.mark.parametrize("gained", ["gud", "g", "d", "ud"])
@pytest.mark.parametrize("least", [0.5, 0.01], ids=["shown by the outputs", "saved"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_those_of_the_plain_lines(packed, bias, least, gained):
    x, mlp = randn(3, 5, IN).requires_grad_(), linears(packed, bias, least, gained)
    found, expected = ops.gated_mlp(x, mlp[:-1], mlp[-1], SILU), ops.reference(x, mlp[:-1], mlp[-1], SILU)
    torch.testing.assert_close(found, expected)
    of = wanted(x, mlp)
    for own, other in zip(gradients(found, of), gradients(expected, of), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("needs", ["h", "x", "hx", "ABh", "A"])
def test_gradcheck_for_subsets_of_inputs_that_take_gradients(needs):
    x, mlp = randn(4, IN).requires_grad_("x" in needs), linears(False, True)
    for one in mlp:
        for name, t in (("A", one.A), ("B", one.B), ("h", one.h)):
            t.requires_grad_(name in needs)
    mask = mask_of(x, 0.4)

    def run(*_: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ops.gated_mlp(x, mlp[:-1], mlp[-1], SILU, mask, 0.4)

    assert torch.autograd.gradcheck(run, wanted(x, mlp))


@pytest.mark.parametrize("least, more", [(0.5, 0), (0.01, 2)])
def test_of_gate_and_up_nothing_more_is_kept_where_their_outputs_show_it(least, more):
    x, mlp = randn(ROWS, IN).requires_grad_(), linears(False, True, least)
    known = [t for one in mlp for t in (*one[:4], one.h)]
    found = kept(lambda: ops.gated_mlp(x, mlp[:-1], mlp[-1], SILU), known)
    shapes = [(ROWS, IN), (ROWS, 5), (ROWS, 4), *[(ROWS, FFN)] * (2 + more), (ROWS, IN)]  # the last: down's x Wᵀ
    assert sorted(shape for _, shape in found) == sorted(shapes)


def test_in_16_bits_gradients_of_gains_are_near_those_in_float64():
    exact = linears(False, True)
    mlp = [
        p._replace(
            W=p.W.bfloat16(),
            bias=p.bias.bfloat16(),
            **{name: getattr(p, name).detach().float().requires_grad_() for name in "ABh"},
        )
        for p in exact
    ]
    x = randn(64, IN)
    reference = [p._replace(W=q.W.double(), bias=q.bias.double()) for p, q in zip(exact, mlp, strict=True)]
    of, wide = [p.h for p in mlp], [p.h for p in reference]
    x16 = x.bfloat16().requires_grad_()
    found = gradients(ops.gated_mlp(x16, mlp[:-1], mlp[-1], SILU), of)
    expected = gradients(ops.reference(x16.detach().double(), reference[:-1], reference[-1], SILU), wide)
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == torch.float32
        assert (own - other).norm() <= 0.03 * other.norm()
