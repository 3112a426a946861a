"""Linears of one input with their updates as one node, against the plain lines they stand for."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from against import DTYPES, as_dtype, assert_as_exact, gradients, kept, projection, randn, seeds_of, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops.dropout import keep_mask, kept_share
from lorakit.ops.projections import Projection, project, reference


def several(size_in: int, ranks: tuple[int | None, ...], bias: bool = True) -> list[Projection]:
    return [projection(size_in, 3 + i, rank, bias, seed=10 * i, scale=0.7 + i) for i, rank in enumerate(ranks)]


def side_by_side(x, projections, dropout: float):
    """The fast outputs, and the plain ones with the same mask."""
    (seed,) = seeds_of(1)
    fast = project(x, projections, dropout)
    keep = (keep_mask(x.reshape(-1, x.shape[-1]), dropout, seed) != 0).view(x.shape).to(x.dtype)
    return fast, reference(x, projections, keep, kept_share(dropout))


RANKS = [(2,), (None,), (2, 3), (None, 1), (2, None, 5), (1, 1, 1), (None, None, 4)]
shapes = st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 6)).map(lambda s: (*s[0], s[1]))
layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same shape, other strides."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x[:1].expand(x.shape) if layout == "expanded" and len(x) else x


@settings(max_examples=80, deadline=None)
@given(shape=shapes, ranks=st.sampled_from(RANKS), bias=st.booleans(), dropout=st.sampled_from([0.0, 0.3, 0.5]), layout=layouts)
def test_values_and_gradients_are_those_of_the_plain_lines(shape, ranks, bias, dropout, layout):
    x = laid_out(randn(*shape), layout).detach().requires_grad_()
    projections = [as_dtype(p, torch.float64) for p in several(shape[-1], ranks, bias)]
    before = x.detach().clone()
    fast, plain = side_by_side(x, projections, dropout)
    of = wanted(x, projections)
    for a, e in zip([*fast, *gradients(fast, of)], [*plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)
    assert torch.equal(x, before)


SUBSETS = [s for n in range(1, 4) for s in itertools.combinations("xAB", n)]


@pytest.mark.parametrize("needs", SUBSETS, ids="".join)
@pytest.mark.parametrize("ranks", [(2,), (2, None, 1), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_for_every_subset_of_inputs_that_take_gradients(needs, ranks, dropout):
    x = randn(2, 3, 4).requires_grad_("x" in needs)
    projections = [as_dtype(p, torch.float64, trained="".join(needs)) for p in several(4, ranks, bias=False)]

    def run(*_):
        seeds_of(0)
        return project(x, projections, dropout)

    assert gradcheck(run, wanted(x, projections))


def test_each_projection_may_have_other_factors_that_train():
    trained = ["A", "B", "", "AB"]
    x = randn(5, 4)
    projections = [as_dtype(p, torch.float64, trained=t) for p, t in zip(several(4, (2, 3, 1, 2)), trained, strict=True)]
    fast, plain = side_by_side(x, projections, 0.3)
    of = wanted(projections)
    assert len(of) == 4
    for a, e in zip(gradients(fast, of), gradients(plain, of), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("trained", ["", "A", "B"])
def test_frozen_factors_pass_the_inputs_gradient_on(trained):
    x = randn(5, 4).requires_grad_()
    projections = [as_dtype(p, torch.float64, trained=trained) for p in several(4, (2, None, 3))]
    fast, plain = side_by_side(x, projections, 0.5)
    for a, e in zip(gradients(fast, [x]), gradients(plain, [x]), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32 factors", "factors in the same type"])
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(dtype, factors, dropout):
    x, sizes = randn(96, 64, dtype=dtype).requires_grad_(), [projection(64, 48 + 16 * i, 8, seed=10 * i) for i in range(3)]
    projections = [as_dtype(p, dtype, factors) for p in sizes]
    exact_x = x.detach().double().requires_grad_()
    exact_projections = [as_dtype(p, torch.float64) for p in projections]
    fast, plain = side_by_side(x, projections, dropout)
    _, exact = side_by_side(exact_x, exact_projections, dropout)
    of, exact_of = wanted(x, projections), wanted(exact_x, exact_projections)
    assert [g.dtype for g in gradients(fast, of)] == [t.dtype for t in of]
    assert {o.dtype for o in fast} == {dtype}
    assert_as_exact(fast, plain, exact)
    for a, p, e in zip(gradients(fast, of), gradients(plain, of), gradients(exact, exact_of), strict=True):
        assert_as_exact([a], [p], [e])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_a_fresh_update_leaves_every_bit_of_the_base(dtype):
    x = randn(70, 32, dtype=dtype).requires_grad_()
    projections = [as_dtype(projection(32, 40, 4, seed=i), dtype, torch.float32) for i in (0, 9)]
    for p in projections:
        p.B.data.zero_()
    for out, p in zip(project(x, projections, 0.5), projections, strict=True):
        assert torch.equal(out, F.linear(x, p.W, p.bias))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_no_rows_give_no_rows_and_zero_gradients(shape, dropout):
    x = randn(*shape).requires_grad_()
    projections = [as_dtype(p, torch.float64) for p in several(4, (2, None, 1))]
    outs = project(x, projections, dropout)
    assert [o.shape for o in outs] == [(*shape[:-1], 3 + i) for i in range(3)]
    of = wanted(x, projections)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients(outs, of), of, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_x_once_and_the_rank_wide_products_only(dtype, dropout):
    x = randn(4, 16, 32, dtype=dtype).requires_grad_()
    projections = [as_dtype(p, dtype, torch.float32) for p in several(32, (2, None, 3))]
    known = [t for p in projections for t in p[:4]]
    assert kept(lambda: project(x, projections, dropout), known) == sorted([(dtype, (64, 32)), (dtype, (64, 5))], key=str)


def test_backward_keeps_no_x_that_no_gradient_needs():
    x = randn(64, 32).requires_grad_()
    frozen = [as_dtype(p, torch.float64, trained="") for p in several(32, (2, 3))]
    assert kept(lambda: project(x, frozen, 0.5), [t for p in frozen for t in p[:4]]) == []
    only_B = [as_dtype(p, torch.float64, trained="B") for p in several(32, (2, 3))]
    assert kept(lambda: project(x, only_B, 0.5), [t for p in only_B for t in p[:4]]) == [(torch.float64, (64, 5))]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_backward_through_the_same_node_gives_the_same_gradients(dropout):
    x = randn(5, 4).requires_grad_()
    projections = [as_dtype(p, torch.float64) for p in several(4, (2, None, 3))]
    outs, of = project(x, projections, dropout), wanted(x, projections)
    for first, again in zip(gradients(outs, of), gradients(outs, of), strict=True):
        assert torch.equal(first, again)


def test_a_gradient_of_one_output_alone_is_right():
    x = randn(5, 4).requires_grad_()
    projections = [as_dtype(p, torch.float64) for p in several(4, (2, 1, 3))]
    fast, plain = side_by_side(x, projections, 0.0)
    of = [x, projections[1].A, projections[1].B]
    for a, e in zip(gradients(fast[1], of), gradients(plain[1], of), strict=True):
        torch.testing.assert_close(a, e)


def test_gradients_add_up_over_batches_and_may_be_changed_in_place():
    x = randn(5, 4)
    projections = [as_dtype(p, torch.float64) for p in several(4, (2, 1, 3))]
    of = wanted(projections)
    once = gradients(project(x, projections), of)
    for _ in range(2):
        sum((o * randn(*o.shape, seed=9 + i)).sum() for i, o in enumerate(project(x, projections))).backward()
    for t, g in zip(of, once, strict=True):
        torch.testing.assert_close(t.grad, 2 * g)
    torch.nn.utils.clip_grad_norm_(of, 1e-3)
    assert float(torch.stack([t.grad.norm() for t in of]).norm()) == pytest.approx(1e-3)


def test_an_input_that_was_written_into_meanwhile_is_refused():
    leaf = randn(5, 4).requires_grad_()
    x = leaf * 1
    out = project(x, [as_dtype(projection(4, 3, 2), torch.float64)])[0]
    x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_a_second_derivative_is_refused_rather_than_wrong():
    x = randn(3, 4).requires_grad_()
    out = project(x, [as_dtype(projection(4, 3, 2), torch.float64)])[0]
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_makes_the_same_mask_again(reentrant):
    from torch.utils.checkpoint import checkpoint

    x = randn(5, 4).requires_grad_()
    projections = [as_dtype(p, torch.float64) for p in several(4, (2, 1))]
    of, found = wanted(x, projections), []
    for run in (lambda x: project(x, projections, 0.5), lambda x: checkpoint(project, x, projections, 0.5, use_reentrant=reentrant)):
        seeds_of(0)
        for t in of:
            t.grad = None
        sum(o.square().sum() for o in run(x)).backward()
        found.append([t.grad.clone() for t in of])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inference_mode_computes_the_same():
    x, projections = randn(5, 4), [as_dtype(p, torch.float64) for p in several(4, (2, None))]
    with torch.inference_mode():
        inferred = project(x, projections)
    assert all(torch.equal(a, b) for a, b in zip(inferred, project(x, projections), strict=True))
