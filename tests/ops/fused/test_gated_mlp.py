"""The gated feed-forward block as one node, against the plain lines it stands for."""

from __future__ import annotations

import pytest
import torch
from against import (
    DTYPES,
    as_dtype,
    assert_as_exact,
    gradients,
    keep,
    kept,
    mask_of,
    projection,
    randn,
    seeds_of,
    wanted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from lorakit.ops import projections as p
from lorakit.ops.dropout import draw_mask, draw_seed, kept_share
from lorakit.ops.fused import gated_mlp as ops
from lorakit.ops.fused.gated_mlp import ACTIVATIONS, SILU, Activation
from lorakit.ops.projections import Projection

ACTS = pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)
# Ranks of gate, up and down; or of gate and up in one, and down.
RANKS = [
    (2, 2, 2),
    (1, None, None),
    (None, 2, None),
    (None, None, 3),
    (2, 3, None),
    (None, 1, 2),
    (2, 2),
    (2, None),
    (None, 3),
]
WHOLE = pytest.mark.parametrize("ranks", [(2, 3, 4), (5, 4)], ids=["gate and up", "in one"])


def linears(size: int, ffn: int, ranks: tuple, bias: bool = False, **dtypes) -> list[Projection]:
    sizes = [(size, ffn), (size, ffn), (ffn, size)] if len(ranks) == 3 else [(size, 2 * ffn), (ffn, size)]
    made = zip(sizes, ranks, strict=True)
    return [as_dtype(projection(*s, r, bias, seed=10 * i, scale=0.5 + i), **dtypes) for i, (s, r) in enumerate(made)]


def gated_mlp(x: Tensor, mlp: list[Projection], act: Activation, dropout: float = 0.0) -> Tensor:
    """With a mask for x that no generator draws, where an update reads x, and the first draw of a seed for h."""
    seeds_of(0)
    mask = mask_of(x, dropout) if any(one.A is not None for one in mlp[:-1]) else None
    return ops.gated_mlp(x, mlp[:-1], mlp[-1], act, mask, dropout)


def plain(x: Tensor, mlp: list[Projection], act: Activation, dropout: float = 0.0) -> Tensor:
    """The equation with the same masks."""
    (seed,), mask, share = seeds_of(1), mask_of(x, dropout), kept_share(dropout)
    outs = p.reference(x, mlp[:-1], keep(x, mask) if mask else None, share)
    gated, lifted = outs if len(outs) == 2 else outs[0].chunk(2, -1)
    h = act.forward(gated) * lifted
    mask = mask_of(h, dropout, seed)
    return p.reference(h, [mlp[-1]], keep(h, mask) if mask else None, share)[0]


shapes = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 5)).map(lambda s: (*s[0], s[1]))


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes,
    ffn=st.integers(1, 6),
    ranks=st.sampled_from(RANKS),
    bias=st.booleans(),
    act=st.sampled_from([*ACTIVATIONS.values()]),
    dropout=st.sampled_from([0.0, 0.4]),
    transposed=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_plain_lines(shape, ffn, ranks, bias, act, dropout, transposed):
    x = randn(*shape)
    x = (x.transpose(0, -1).contiguous().transpose(0, -1) if transposed else x).requires_grad_()
    mlp, before = linears(shape[-1], ffn, ranks, bias, dtype=torch.float64), x.detach().clone()
    expected, of = plain(x, mlp, act, dropout), wanted(x, mlp)
    found = gated_mlp(x, mlp, act, dropout)
    if not dropout:
        torch.testing.assert_close(ops.reference(x, mlp[:-1], mlp[-1], act), expected)
    for a, e in zip([found, *gradients(found, of)], [expected, *gradients(expected, of)], strict=True):
        torch.testing.assert_close(a, e)
    assert torch.equal(x, before)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("needs", ["xAB", "AB", "x", "A", "B", "xB"])
def test_gradcheck_for_every_subset_of_inputs_that_take_gradients(ranks, dropout, needs):
    x = randn(1, 3, 2).requires_grad_("x" in needs)
    mlp = linears(2, 3, ranks, dtype=torch.float64, trained=needs)
    assert gradcheck(lambda *_: gated_mlp(x, mlp, SILU, dropout), wanted(x, mlp))


@ACTS
@WHOLE
def test_gradcheck_of_each_activation(act, ranks):
    x, mlp = randn(3, 2).requires_grad_(), linears(2, 3, ranks, dtype=torch.float64)
    assert gradcheck(lambda *_: gated_mlp(x, mlp, act), wanted(x, mlp))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs(name):
    x, g = randn(1000).mul_(3).requires_grad_(), randn(1000, seed=1)
    F = torch.nn.functional
    expected = {"silu": F.silu(x), "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}[name]
    assert torch.equal(ACTIVATIONS[name].forward(x), expected)
    assert torch.equal(ACTIVATIONS[name].backward(g.clone(), x.detach()), torch.autograd.grad(expected, x, g)[0])


@ACTS
@WHOLE
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(act, ranks, dtype, dropout):
    x, mlp = randn(96, 32, dtype=dtype).requires_grad_(), linears(32, 80, ranks, dtype=dtype, factors=torch.float32)
    exact_x, exact_mlp = x.detach().double().requires_grad_(), [as_dtype(t, torch.float64) for t in mlp]
    exact, expected = plain(exact_x, exact_mlp, act, dropout), plain(x, mlp, act, dropout)
    found = gated_mlp(x, mlp, act, dropout)
    of, exact_of = wanted(x, mlp), wanted(exact_x, exact_mlp)
    assert [g.dtype for g in gradients(found, of)] == [t.dtype for t in of]
    assert_as_exact([found], [expected], [exact])
    for a, b, e in zip(gradients(found, of), gradients(expected, of), gradients(exact, exact_of), strict=True):
        assert_as_exact([a], [b], [e])


@ACTS
@WHOLE
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_fresh_updates_leave_every_bit_of_the_base(act, ranks, dtype):
    x, mlp = randn(70, 32, dtype=dtype).requires_grad_(), linears(32, 48, ranks, dtype=dtype, factors=torch.float32)
    for one in mlp:
        one.B.data.zero_()
    base = [one._replace(A=None, B=None) for one in mlp]
    assert torch.equal(gated_mlp(x, mlp, act, 0.5), ops.reference(x, base[:-1], base[-1], act))


@ACTS
@WHOLE
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_x_gate_up_the_rank_wide_products_and_packed_masks_only(act, ranks, dtype, dropout):
    x, mlp = randn(3, 5, 6, dtype=dtype).requires_grad_(), linears(6, 7, ranks, dtype=dtype, factors=torch.float32)
    known = [t for one in mlp for t in one[:4]]
    expected = [(dtype, s) for s in ((15, 6), (15, 5), (15, 4), *([(15, 7)] * 2 if len(ranks) == 3 else [(15, 14)]))]
    if dropout:
        expected += [(torch.uint8, (12,)), (torch.uint8, (14,))]  # 90 and 105 bits
    assert kept(lambda: gated_mlp(x, mlp, act, dropout), known) == sorted(expected, key=str)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("ranks", [(2, None, 1), (2, 1)], ids=str)
def test_no_rows_give_no_rows_and_zero_gradients(shape, dropout, ranks):
    x, mlp = randn(*shape).requires_grad_(), linears(4, 6, ranks, dtype=torch.float64)
    out, of = gated_mlp(x, mlp, SILU, dropout), wanted(x, mlp)
    assert out.shape == shape
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients(out, of), of, strict=True))


@ACTS
@WHOLE
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(act, ranks, dropout):
    x, mlp = randn(5, 4).requires_grad_(), linears(4, 6, ranks, dtype=torch.float64)
    out, of = gated_mlp(x, mlp, act, dropout), wanted(x, mlp)
    for first, again in zip(gradients(out, of), gradients(out, of), strict=True):
        assert torch.equal(first, again)


@WHOLE
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_output_may_be_changed_in_place(ranks, shape, dropout):
    x, mlp = randn(*shape).requires_grad_(), linears(4, 6, ranks, dtype=torch.float64)
    of, plain_out = wanted(x, mlp), plain(x, mlp, SILU, dropout)
    found = gated_mlp(x, mlp, SILU, dropout).add_(x).relu_()
    for a, e in zip(gradients(found, of), gradients((plain_out + x).relu(), of), strict=True):
        torch.testing.assert_close(a, e)


def test_gate_and_up_share_a_mask_and_down_has_another():
    """With x of ones and all else ones, outputs count what was kept."""
    ones = Projection(torch.zeros(1, 64), None, torch.ones(1, 64), torch.ones(1, 1), 1.0)
    identity = Activation(lambda t: t.clone(), lambda g, t: g)
    x = torch.ones(3, 64)
    count = keep(x, mask_of(x, 0.5)).sum(1, keepdim=True) / 0.5
    down = Projection(torch.ones(1, 1), None, None, None, 1.0)
    torch.testing.assert_close(gated_mlp(x, [ones, ones, down], identity, 0.5), count.square())
    (seed,) = seeds_of(1)
    adapted = Projection(torch.zeros(1, 1), None, torch.ones(1, 1), torch.ones(1, 1), 1.0)
    h = count.square()
    expected = h * keep(h, mask_of(h, 0.5, seed)) / 0.5
    torch.testing.assert_close(gated_mlp(x, [ones, ones, adapted], identity, 0.5), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_a_seed_is_drawn_for_an_update_of_down_only(ranks, dropout):
    """As each linear by itself does, so torch's generator moves on the same way; the mask for x is the caller's."""
    x, mlp = randn(3, 4).requires_grad_(), linears(4, 6, ranks, dtype=torch.float64)
    first, second = seeds_of(2)
    gated_mlp(x, mlp, SILU, dropout).sum().backward()
    assert draw_seed() == (second if dropout and ranks[-1] is not None else first)


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, mlp = randn(3, 4).requires_grad_(), linears(4, 6, (2, 2, 2), dtype=torch.float64)
    (first,) = torch.autograd.grad(gated_mlp(x, mlp, SILU).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@WHOLE
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_makes_the_same_masks_again(ranks, reentrant):
    from torch.utils.checkpoint import checkpoint

    x, mlp = randn(5, 4).requires_grad_(), linears(4, 6, ranks, dtype=torch.float64)
    of, found = wanted(x, mlp), []

    def run(x: Tensor) -> Tensor:
        return ops.gated_mlp(x, mlp[:-1], mlp[-1], SILU, draw_mask(x, 0.5, draw_seed()), 0.5)

    for way in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        seeds_of(0)
        for t in of:
            t.grad = None
        way(x).square().sum().backward()
        found.append([t.grad.clone() for t in of])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
