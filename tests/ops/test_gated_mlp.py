"""The gated feed-forward block as one node, against the plain lines it stands for."""

from __future__ import annotations

import pytest
import torch
from against import DTYPES, as_dtype, assert_as_exact, gradients, kept, projection, randn, seeds_of, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops import gated_mlp as ops
from lorakit.ops import projections as p
from lorakit.ops.dropout import keep_mask, kept_share
from lorakit.ops.gated_mlp import GELU_TANH, SILU, gated_mlp

ACTS = pytest.mark.parametrize("act", [SILU, GELU_TANH], ids=["silu", "gelu_tanh"])
RANKS = [(2, 2, 2), (1, None, None), (None, 2, None), (None, None, 3), (2, 3, None), (None, 1, 2)]


def three(size: int, ffn: int, ranks: tuple, bias: bool = False, **dtypes) -> list[p.Projection]:
    sizes = [(size, ffn), (size, ffn), (ffn, size)]
    return [as_dtype(projection(*s, r, bias, seed=10 * i, scale=0.5 + i), **dtypes) for i, (s, r) in enumerate(zip(sizes, ranks))]


def plain(x, gate, up, down, act, dropout: float):
    """The equation with the masks that the next call draws; without dropout this is `reference`."""
    seeds = seeds_of(2)

    def keep(t, seed):
        return (keep_mask(t.reshape(-1, t.shape[-1]), dropout, seed) != 0).view(t.shape).to(t.dtype) if dropout else None

    share = kept_share(dropout)
    gated, lifted = p.reference(x, [gate, up], keep(x, seeds[0]), share)
    h = act.forward(gated) * lifted
    return p.reference(h, [down], keep(h, seeds[1]), share)[0]


shapes = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 5)).map(lambda s: (*s[0], s[1]))


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes, ffn=st.integers(1, 6), ranks=st.sampled_from(RANKS), bias=st.booleans(), act=st.sampled_from([SILU, GELU_TANH]),
    dropout=st.sampled_from([0.0, 0.4]), transposed=st.booleans(),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_plain_lines(shape, ffn, ranks, bias, act, dropout, transposed):
    x = randn(*shape)
    x = (x.transpose(0, -1).contiguous().transpose(0, -1) if transposed else x).requires_grad_()
    mlp, before = three(shape[-1], ffn, ranks, bias, dtype=torch.float64), x.detach().clone()
    expected, of = plain(x, *mlp, act, dropout), wanted(x, mlp)
    found = gated_mlp(x, *mlp, act, dropout)
    if not dropout:
        torch.testing.assert_close(ops.reference(x, *mlp, act), expected)
    for a, e in zip([found, *gradients(found, of)], [expected, *gradients(expected, of)], strict=True):
        torch.testing.assert_close(a, e)
    assert torch.equal(x, before)


@ACTS
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("needs", ["xAB", "AB", "x", "A", "B", "xB"])
def test_gradcheck_for_every_subset_of_inputs_that_take_gradients(act, ranks, dropout, needs):
    x = randn(2, 2, 3).requires_grad_("x" in needs)
    mlp = three(3, 4, ranks, dtype=torch.float64, trained=needs)

    def run(*_):
        seeds_of(0)
        return gated_mlp(x, *mlp, act, dropout)

    assert gradcheck(run, wanted(x, mlp))


@ACTS
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(act, dtype, dropout):
    x, mlp = randn(96, 32, dtype=dtype).requires_grad_(), three(32, 80, (8, 8, 8), dtype=dtype, factors=torch.float32)
    exact_x, exact_mlp = x.detach().double().requires_grad_(), [as_dtype(t, torch.float64) for t in mlp]
    exact, expected = plain(exact_x, *exact_mlp, act, dropout), plain(x, *mlp, act, dropout)
    found = gated_mlp(x, *mlp, act, dropout)
    of, exact_of = wanted(x, mlp), wanted(exact_x, exact_mlp)
    assert [g.dtype for g in gradients(found, of)] == [t.dtype for t in of]
    assert_as_exact([found], [expected], [exact])
    for a, b, e in zip(gradients(found, of), gradients(expected, of), gradients(exact, exact_of), strict=True):
        assert_as_exact([a], [b], [e])


@ACTS
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_fresh_updates_leave_every_bit_of_the_base(act, dtype):
    x, mlp = randn(70, 32, dtype=dtype).requires_grad_(), three(32, 48, (4, 4, 4), dtype=dtype, factors=torch.float32)
    for one in mlp:
        one.B.data.zero_()
    base = [one._replace(A=None, B=None) for one in mlp]
    assert torch.equal(gated_mlp(x, *mlp, act, 0.5), ops.reference(x, *base, act))


@ACTS
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_x_gate_up_and_the_rank_wide_products_only(act, dtype, dropout):
    x, mlp = randn(4, 16, 32, dtype=dtype).requires_grad_(), three(32, 48, (2, 3, 4), dtype=dtype, factors=torch.float32)
    known = [t for one in mlp for t in one[:4]]
    shapes = [(64, 32), (64, 48), (64, 48), (64, 2 + 3), (64, 4)]
    assert kept(lambda: gated_mlp(x, *mlp, act, dropout), known) == sorted(((dtype, s) for s in shapes), key=str)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_no_rows_give_no_rows_and_zero_gradients(shape, dropout):
    x, mlp = randn(*shape).requires_grad_(), three(4, 6, (2, None, 1), dtype=torch.float64)
    out, of = gated_mlp(x, *mlp, SILU, dropout), wanted(x, mlp)
    assert out.shape == shape
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients(out, of), of, strict=True))


@ACTS
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(act, dropout):
    x, mlp = randn(5, 4).requires_grad_(), three(4, 6, (2, 1, 3), dtype=torch.float64)
    out, of = gated_mlp(x, *mlp, act, dropout), wanted(x, mlp)
    for first, again in zip(gradients(out, of), gradients(out, of), strict=True):
        assert torch.equal(first, again)


def test_gate_and_up_share_a_mask_and_down_has_another():
    """With x of ones and all else ones, outputs count what was kept."""
    ones = p.Projection(torch.zeros(1, 64), None, torch.ones(1, 64), torch.ones(1, 1), 1.0)
    seeds = seeds_of(2)
    keep = (keep_mask(torch.ones(3, 64), 0.5, seeds[0]) != 0).sum(1, keepdim=True) / 0.5
    down = p.Projection(torch.ones(1, 1), None, None, None, 1.0)
    square = ops.Activation(lambda t: t.clone(), lambda g, t: g)
    torch.testing.assert_close(gated_mlp(torch.ones(3, 64), ones, ones, down, square, 0.5), keep.square())
    assert seeds[0] != seeds[1]


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, mlp = randn(3, 4).requires_grad_(), three(4, 6, (2, 2, 2), dtype=torch.float64)
    (first,) = torch.autograd.grad(gated_mlp(x, *mlp, SILU).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_makes_the_same_masks_again(reentrant):
    from torch.utils.checkpoint import checkpoint

    x, mlp = randn(5, 4).requires_grad_(), three(4, 6, (2, 1, 3), dtype=torch.float64)
    of, found = wanted(x, mlp), []
    for run in (lambda x: gated_mlp(x, *mlp, SILU, 0.5), lambda x: checkpoint(gated_mlp, x, *mlp, SILU, 0.5, use_reentrant=reentrant)):
        seeds_of(0)
        for t in of:
            t.grad = None
        run(x).square().sum().backward()
        found.append([t.grad.clone() for t in of])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
