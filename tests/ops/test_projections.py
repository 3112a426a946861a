"""A frozen linear with its update as one node, and the parts of that node for several linears,
against the plain lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from against import DTYPES, as_dtype, assert_as_exact, gradients, keep, kept, mask_of, projection, randn, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from lorakit.ops import projections as parts
from lorakit.ops import summed
from lorakit.ops.dropout import kept_share, masked
from lorakit.ops.projections import NeedsGrad, Projection, project, reference


def several(size_in: int, ranks: tuple[int | None, ...], bias: bool = True) -> list[Projection]:
    return [projection(size_in, 3 + i, rank, bias, seed=10 * i, scale=0.7 + i) for i, rank in enumerate(ranks)]


def one(size_in: int, rank: int | None = 2, trained: str = "AB", bias: bool = True) -> Projection:
    return as_dtype(projection(size_in, 3, rank, bias), torch.float64, trained=trained)


def side_by_side(x: Tensor, p: Projection, dropout: float) -> tuple[Tensor, Tensor]:
    """The fast output, and the plain one with the same mask."""
    mask = mask_of(x, dropout)
    plain = reference(x, [p], keep(x, mask), kept_share(dropout)) if mask else reference(x, [p])
    return project(x, p, mask), plain[0]


FORMS = {"summed weight": (1e9, 1e9, 0), "torch's own nodes": (0, 0, 1e9), "our node": (0, 0, 0)}


@contextmanager
def computed_by(form: str) -> Iterator[None]:
    """Make `project` choose one of its forms for every size."""
    before = summed.LARGEST, summed.LARGEST_KEPT, parts.FEW
    summed.LARGEST, summed.LARGEST_KEPT, parts.FEW = FORMS[form]
    try:
        yield
    finally:
        summed.LARGEST, summed.LARGEST_KEPT, parts.FEW = before


@pytest.fixture(params=FORMS)
def form(request):
    with computed_by(request.param):
        yield request.param


@pytest.fixture
def our_node():
    with computed_by("our node"):
        yield


shapes = st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 6)).map(lambda s: (*s[0], s[1]))
layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same shape, other strides."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x[:1].expand(x.shape) if layout == "expanded" and len(x) else x


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes,
    rank=st.sampled_from([None, 1, 2, 5]),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3, 0.5]),
    layout=layouts,
    form=st.sampled_from(sorted(FORMS)),
)
def test_values_and_gradients_are_those_of_the_plain_lines(shape, rank, bias, dropout, layout, form):
    x = laid_out(randn(*shape), layout).detach().requires_grad_()
    p = one(shape[-1], rank, bias=bias)
    before = x.detach().clone()
    with computed_by(form):
        fast, plain = side_by_side(x, p, dropout)
    of = wanted(x, [p])
    for a, e in zip([fast, *gradients(fast, of)], [plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)
    assert torch.equal(x, before)


RANKS = [(2,), (None,), (2, 3), (None, 1), (2, None, 5), (1, 1, 1), (None, None, 4)]
FLAGS = [(True, True, True), (True, False, False), (False, True, True), (False, False, True), (True, True, False)]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_several_projections_of_one_input_give_the_plain_lines_outputs_and_gradients(ranks, dropout, flags):
    x, needs_x, needs_A, needs_B = randn(6, 4).requires_grad_(), *flags
    # With different factors that train: B of the second one stays as it is.
    projections = [as_dtype(p, torch.float64) for p in several(4, ranks)]
    needs = [(needs_A and p.A is not None, needs_B and p.B is not None and i != 1) for i, p in enumerate(projections)]
    mask, share = mask_of(x, dropout), kept_share(dropout)
    plain = reference(x, projections, keep(x, mask) if mask else None, share)
    grads = [randn(*o.shape, seed=20 + i) for i, o in enumerate(plain)]
    scaled = [p._replace(scale=p.scale / share) for p in projections]
    with torch.no_grad():
        dropped = masked(x, mask) if mask else x
        outs, down = parts.forward(x, dropped, scaled)
        asked = NeedsGrad(needs_x, [a for a, _ in needs], [b for _, b in needs])
        dx, found = parts.backward(grads, x, dropped, mask, down, scaled, asked)
    for a, e in zip(outs, plain, strict=True):
        torch.testing.assert_close(a, e)
    of = wanted(x, projections)
    expected = iter(torch.autograd.grad(plain, of, grads))
    dx_expected = next(expected)
    assert (dx is not None) == needs_x
    if dx is not None:
        torch.testing.assert_close(dx, dx_expected)
    for i, (p, (a, b)) in enumerate(zip(projections, needs, strict=True)):
        assert found[4 * i : 4 * i + 2] == [None, None]
        for factor, asked_for, got in zip((p.A, p.B), (a, b), found[4 * i + 2 : 4 * i + 4], strict=True):
            right = next(expected) if factor is not None else None
            assert (got is not None) == asked_for
            if got is not None:
                torch.testing.assert_close(got, right)


SUBSETS = [s for n in range(1, 4) for s in itertools.combinations("xAB", n)]


@pytest.mark.parametrize("needs", SUBSETS, ids="".join)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_for_every_subset_of_inputs_that_take_gradients(needs, dropout, form):
    x = randn(2, 3, 4).requires_grad_("x" in needs)
    p = one(4, trained="".join(needs), bias=False)
    # The same mask drawn each time, as each forward has: gradcheck writes into x behind autograd's back.
    assert gradcheck(lambda *_: project(x, p, mask_of(x, dropout)), wanted(x, [p]))


def test_gradcheck_without_an_update():
    x, p = randn(2, 3, 4).requires_grad_(), one(4, None)
    assert gradcheck(lambda x: project(x, p), [x])


@pytest.mark.parametrize("trained", ["", "A", "B"])
def test_frozen_factors_pass_the_inputs_gradient_on(trained, form):
    x, p = randn(5, 4).requires_grad_(), one(4, trained=trained)
    fast, plain = side_by_side(x, p, 0.5)
    torch.testing.assert_close(gradients(fast, [x]), gradients(plain, [x]))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32 factors", "factors in the same type"])
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(dtype, factors, dropout, form):
    x, p = randn(96, 64, dtype=dtype).requires_grad_(), as_dtype(projection(64, 48, 8), dtype, factors)
    exact_x, exact_p = x.detach().double().requires_grad_(), as_dtype(p, torch.float64)
    fast, plain = side_by_side(x, p, dropout)
    _, exact = side_by_side(exact_x, exact_p, dropout)
    of, exact_of = wanted(x, [p]), wanted(exact_x, [exact_p])
    assert [g.dtype for g in gradients(fast, of)] == [t.dtype for t in of]
    assert fast.dtype == dtype
    assert_as_exact([fast], [plain], [exact])
    for a, b, e in zip(gradients(fast, of), gradients(plain, of), gradients(exact, exact_of), strict=True):
        assert_as_exact([a], [b], [e])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_a_fresh_update_leaves_every_bit_of_the_base(dtype, form):
    x, p = randn(2, 35, 32, dtype=dtype).requires_grad_(), as_dtype(projection(32, 40, 4), dtype, torch.float32)
    p.B.data.zero_()
    assert torch.equal(project(x, p, mask_of(x, 0.5)), F.linear(x, p.W, p.bias))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_no_rows_give_no_rows_and_zero_gradients(shape, dropout, form):
    x, p = randn(*shape).requires_grad_(), one(4)
    out = project(x, p, mask_of(x, dropout))
    assert out.shape == (*shape[:-1], 3)
    of = wanted(x, [p])
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients(out, of), of, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_x_the_rank_wide_product_and_a_packed_mask_only(dtype, dropout, our_node):
    x, p = randn(3, 3, 5, dtype=dtype).requires_grad_(), as_dtype(projection(5, 7, 2), dtype, torch.float32)
    mask = mask_of(x, dropout)
    expected = [(dtype, (9, 5)), (dtype, (9, 2)), *([(torch.uint8, (6,))] if mask else [])]  # 45 bits
    assert kept(lambda: project(x, p, mask), p[:4]) == sorted(expected, key=str)


def test_backward_keeps_nothing_that_no_gradient_needs(our_node):
    x = randn(64, 32).requires_grad_()
    mask = mask_of(x, 0.5)
    packed = (torch.uint8, (64 * 32 // 8,))

    def of(x: Tensor, trained: str) -> list:
        p = one(32, trained=trained)
        return kept(lambda: project(x, p, mask), p[:4])

    assert of(x, "") == [packed], "for x's own gradient"
    assert of(x, "B") == [(torch.float64, (64, 2)), packed]
    assert of(x.detach(), "B") == [(torch.float64, (64, 2))]
    assert of(x.detach(), "A") == [(torch.float64, (64, 32)), packed]
    plain = one(32, None)
    assert kept(lambda: project(x, plain), plain[:2]) == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(dropout, form):
    x, p = randn(5, 4).requires_grad_(), one(4)
    out, of = project(x, p, mask_of(x, dropout)), wanted(x, [p])
    for first, again in zip(gradients(out, of), gradients(out, of), strict=True):
        assert torch.equal(first, again)


def test_gradients_add_up_over_batches_and_may_be_changed_in_place(form):
    x, p = randn(5, 4), one(4)
    of = wanted([p])
    once = gradients(project(x, p), of)
    for _ in range(2):
        (project(x, p) * randn(5, 3, seed=9)).sum().backward()
    for t, g in zip(of, once, strict=True):
        torch.testing.assert_close(t.grad, 2 * g)
    torch.nn.utils.clip_grad_norm_(of, 1e-3)
    assert float(torch.stack([t.grad.norm() for t in of]).norm()) == pytest.approx(1e-3)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_output_may_be_changed_in_place(shape, dropout, form):
    x, p = randn(*shape).requires_grad_(), one(4)
    fast, plain = side_by_side(x, p, dropout)
    fast.add_(0.1).mul_(2)
    fast[..., 0] = 0
    fast.relu_()
    expected = (2 * (plain + 0.1)).relu() * torch.tensor([0.0, 1.0, 1.0])
    of = wanted(x, [p])
    for a, e in zip(gradients(fast, of), gradients(expected, of), strict=True):
        torch.testing.assert_close(a, e)


def test_an_input_that_was_written_into_meanwhile_is_refused(form):
    leaf = randn(5, 4).requires_grad_()
    x = leaf * 1
    out = project(x, one(4))
    x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_a_second_derivative_is_refused_rather_than_wrong(our_node):
    x = randn(3, 4).requires_grad_()
    (first,) = torch.autograd.grad(project(x, one(4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_inference_mode_computes_the_same():
    x, p = randn(5, 4), one(4)
    with torch.inference_mode():
        inferred = project(x, p, mask_of(x, 0.3))
    assert torch.equal(inferred, project(x, p, mask_of(x, 0.3)))


@pytest.mark.parametrize("by", ["summed weight", "torch's own nodes"])
def test_a_second_derivative_of_a_small_linear_is_that_of_the_plain_lines(by):
    x, p = randn(3, 4).requires_grad_(), one(4)

    def second(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with computed_by(by):
        torch.testing.assert_close(second(project(x, p)), second(reference(x, [p])[0]))


def test_a_small_weight_is_summed_where_that_keeps_little_more_than_the_thin_product():
    def keeps(rows: int, size: int, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> list:
        x = randn(rows, size, dtype=dtype).requires_grad_()
        p = as_dtype(projection(size, size, 4), dtype, torch.float32)
        shapes = kept(lambda: project(x, p, mask_of(x, dropout)), [x, *p[:4]])
        return [shape for _, shape in shapes]

    assert keeps(64, 16) == [(16, 16)]
    assert keeps(16, 16) == [(16, 4)], "16 x 16 is more than twice 16 x 4"
    assert (64, 4) in keeps(64, 16, dropout=0.5), "the update reads another input"
    assert (16, 16) not in keeps(64, 16, torch.bfloat16), "a small update would be rounded away"
    assert keeps(10_000, 128) == [(10_000, 4)], "too large to pay"
