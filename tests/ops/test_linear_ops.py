"""The update added to an output that is at hand, against the plain line it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from against import DTYPES, assert_as_exact, gradients, keep, kept, mask_of, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops.dropout import kept_share
from lorakit.ops.linear import add_low_rank, reference


def tensors(shape: tuple[int, ...], size_out: int, rank: int, dtype=torch.float64):
    """x, W, b, A, B"""
    W, b = randn(size_out, shape[-1], seed=1, dtype=dtype), randn(size_out, seed=2, dtype=dtype)
    return (
        randn(*shape, dtype=dtype),
        W,
        b,
        randn(rank, shape[-1], seed=3, dtype=dtype),
        randn(size_out, rank, seed=4, dtype=dtype),
    )


def plain(y, x, A, B, scale: float, dropout: float):
    """The line with the same mask."""
    mask = mask_of(x, dropout)
    if mask:
        x = x * keep(x, mask) / kept_share(dropout)
    return y + reference(x.to(y.dtype), A, B, scale)


shapes = st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 6)).map(lambda s: (*s[0], s[1]))


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes,
    size_out=st.integers(1, 6),
    rank=st.integers(1, 7),
    scale=st.floats(-3, 3),
    y_takes_gradients=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    transposed=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_plain_line(
    shape, size_out, rank, scale, y_takes_gradients, dropout, transposed
):
    x, W, b, A, B = tensors(shape, size_out, rank)
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if transposed else x
    of = [t.requires_grad_() for t in (x, A, B)]
    if y_takes_gradients:
        of.append(W.requires_grad_())
    expected = plain(F.linear(x, W, b), x, A, B, scale, dropout)
    found = add_low_rank(F.linear(x, W, b), x, A, B, scale, mask_of(x, dropout))
    for a, e in zip([found, *gradients(found, of)], [expected, *gradients(expected, of)], strict=True):
        torch.testing.assert_close(a, e)


SUBSETS = [s for n in range(1, 4) for s in itertools.combinations("xAB", n)]


@pytest.mark.parametrize("needs", SUBSETS, ids="".join)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_right_for_every_subset_of_inputs_that_take_them(needs, shape, dropout):
    x, W, b, A, B = tensors(shape, 5, 2)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    of = [t.requires_grad_() for name, t in zip("xAB", (strided, A, B), strict=True) if name in needs]

    # The same mask drawn each time, as each forward has: gradcheck writes into x behind autograd's back.
    assert gradcheck(
        lambda *_: add_low_rank(F.linear(strided, W, b), strided, A, B, 0.7, mask_of(strided, dropout)), of
    )


def test_the_base_output_takes_its_gradient_through_the_update():
    x, W, b, A, B = tensors((3, 4), 5, 2)
    W.requires_grad_(), b.requires_grad_()
    assert gradcheck(lambda W, b: add_low_rank(F.linear(x, W, b), x, A, B, 0.7), (W, b))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_near_to_float64_maths_as_the_plain_line_with_float32_factors(dtype, dropout):
    x, W, b, A, B = tensors((96, 64), 48, 8, dtype)
    of = x, A, B = [t.requires_grad_() for t in (x, A.float(), B.float())]
    wide = [t.detach().double().requires_grad_() for t in of]
    exact = plain(F.linear(wide[0], W.double(), b.double()), *wide, 0.5, dropout)
    expected = plain(F.linear(x, W, b), x, A, B, 0.5, dropout)
    found = add_low_rank(F.linear(x, W, b), x, A, B, 0.5, mask_of(x, dropout))
    assert (found.dtype, *(g.dtype for g in gradients(found, of))) == (dtype, dtype, torch.float32, torch.float32)
    assert_as_exact([found], [expected], [exact])
    for a, p, e in zip(gradients(found, of), gradients(expected, of), gradients(exact, wide), strict=True):
        assert_as_exact([a], [p], [e])


def test_without_gradients_the_same_bits_are_computed_without_a_node():
    x, W, b, A, B = tensors((2, 3, 8), 5, 2, torch.float32)
    A.requires_grad_()
    with torch.no_grad():
        decoded = add_low_rank(F.linear(x, W, b), x, A, B, 0.7)
    assert torch.equal(decoded, add_low_rank(F.linear(x, W, b), x, A, B, 0.7))
    assert decoded.grad_fn is None


def test_an_output_that_something_else_keeps_is_not_written_into():
    x, W, b, A, B = tensors((3, 4), 5, 2)
    y = F.linear(x, W, b)
    before = y.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert not torch.equal(add_low_rank(y, x, A, B, 0.7, into=False), before)
        assert torch.equal(y, before)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_leaf_that_takes_gradients_is_not_written_into(dropout):
    x, W, b, A, B = tensors((3, 4), 5, 2)
    y = F.linear(x, W, b).requires_grad_()
    out = add_low_rank(y, x, A, B, 0.7, mask_of(x, dropout))
    (g,) = gradients(out, [y])
    assert torch.equal(g, randn(3, 5, seed=9))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_keeps_x_the_rank_wide_product_and_a_packed_mask_only(dropout):
    x, W, b, A, B = tensors((64, 32), 48, 2, torch.float32)
    A.requires_grad_(), B.requires_grad_(), x.requires_grad_()
    mask = mask_of(x, dropout)
    expected = [
        (torch.float32, (64, 2)),
        (torch.float32, (64, 32)),
        *([(torch.uint8, (64 * 32 // 8,))] if mask else []),
    ]
    assert kept(lambda: add_low_rank(F.linear(x, W, b), x, A, B, 1.0, mask), [W, b, A, B]) == expected


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(dropout):
    x, W, b, A, B = tensors((6, 4), 5, 2)
    of = [t.requires_grad_() for t in (x, A, B)]
    out = add_low_rank(F.linear(x, W, b), x, A, B, 0.7, mask_of(x, dropout))
    assert all(torch.equal(a, e) for a, e in zip(gradients(out, of), gradients(out, of), strict=True))


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, W, b, A, B = tensors((3, 4), 5, 2)
    x.requires_grad_()
    (first,) = torch.autograd.grad(add_low_rank(F.linear(x, W, b), x, A, B, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("into", [True, False])
def test_the_output_may_be_changed_in_place(dropout, into):
    x, W, b, A, B = tensors((2, 3, 4), 5, 2)
    of = [t.requires_grad_() for t in (x, A, B)]
    found = add_low_rank(F.linear(x, W, b), x, A, B, 0.7, mask_of(x, dropout), into=into)
    expected = 2 * plain(F.linear(x, W, b), x, A, B, 0.7, dropout)
    for a, e in zip(gradients(found.mul_(2).relu_(), of), gradients(expected.relu(), of), strict=True):
        torch.testing.assert_close(a, e)
