"""Rows in groups, each with an adapter of its own, against each group by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from against import DTYPES, as_dtype, assert_as_exact, gradients, projection, randn, seeds_of, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from lorakit.ops import gated_mlp as gated
from lorakit.ops import linear, projections
from lorakit.ops.dropout import keep_mask, kept_share
from lorakit.ops.projections import Projection, project


def grouped(size_in: int, size_out: int, rank: int, groups: int, seed: int = 0) -> Projection:
    """One weight, and as many updates as there are groups."""
    each = [projection(size_in, size_out, rank, seed=seed + 100 * g) for g in range(groups)]
    A, B = (torch.stack([p[i] for p in each]) for i in (2, 3))
    return each[0]._replace(A=A, B=B)


def one_by_one(x: Tensor, projections_: list[Projection], dropout: float, seed: int) -> list[Tensor]:
    """The plain lines for each group of x: [rows, ..., in], with the mask that is drawn for all of x."""
    groups = next(p.A.shape[0] for p in projections_ if p.A is not None)
    keep = (keep_mask(x.reshape(-1, x.shape[-1]), dropout, seed) != 0).view(x.shape).to(x.dtype)
    parts = []
    for g, (rows, mask) in enumerate(zip(x.chunk(groups), keep.chunk(groups), strict=True)):
        own = [p if p.A is None else p._replace(A=p.A[g], B=p.B[g]) for p in projections_]
        parts.append(projections.reference(rows, own, mask, kept_share(dropout)))
    return [torch.cat(outs) for outs in zip(*parts, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4), rows=st.integers(1, 3), tokens=st.integers(1, 3), ranks=st.sampled_from([(2,), (2, 3), (1, None, 4), (None, 2)]),
    dropout=st.sampled_from([0.0, 0.4]), turned=st.booleans(),
)  # fmt: skip
def test_projections_of_each_group_are_those_of_its_adapter(groups, rows, tokens, ranks, dropout, turned):
    x = randn(groups * rows, tokens, 5)
    x = (x.transpose(1, 2).contiguous().transpose(1, 2) if turned else x).requires_grad_()
    several = [grouped(5, 3 + i, r, groups, seed=10 * i) if r else projection(5, 3 + i, None, seed=i) for i, r in enumerate(ranks)]
    several = [as_dtype(p, torch.float64) for p in several]
    (seed,) = seeds_of(1)
    fast, plain = project(x, several, dropout), one_by_one(x, several, dropout, seed)
    of = wanted(x, several)
    for a, e in zip([*fast, *gradients(fast, of)], [*plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)


def mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """The equation for each group."""
    own = [[p._replace(A=p.A[g], B=p.B[g]) for p in (gate, up, down)] for g in range(gate.A.shape[0])]
    return torch.cat([gated.reference(rows, *three, gated.SILU) for rows, three in zip(x.chunk(len(own)), own, strict=True)])


def test_a_gated_mlp_of_groups_is_that_of_each_group():
    x = randn(6, 4, 8).requires_grad_()
    three = [as_dtype(p, torch.float64) for p in (grouped(8, 12, 2, 3), grouped(8, 12, 2, 3, seed=10), grouped(12, 8, 5, 3, seed=20))]
    fast, plain = gated.gated_mlp(x, *three, gated.SILU), mlp(x, *three)
    of = wanted(x, three)
    for a, e in zip([fast, *gradients(fast, of)], [plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 4), rows=st.integers(0, 3), dropout=st.sampled_from([0.0, 0.4]), base_takes_gradients=st.booleans())
def test_updates_added_to_a_given_output_are_those_of_each_group(groups, rows, dropout, base_takes_gradients):
    x, y = randn(groups * rows, 2, 5).requires_grad_(), randn(groups * rows, 2, 4, seed=1).requires_grad_(base_takes_gradients)
    p = as_dtype(grouped(5, 4, 3, groups), torch.float64)
    (seed,) = seeds_of(1)
    fast = linear.add_low_rank(y * 1.0, x, p.A, p.B, p.scale, dropout)
    zero = p._replace(W=torch.zeros_like(p.W), bias=None)
    plain = y + one_by_one(x, [zero], dropout, seed)[0] if rows else y * 1.0 + 0 * x.sum()
    of = [*wanted(x, [p]), *([y] if base_takes_gradients else [])] if rows else [x]
    for a, e in zip([fast, *gradients(fast, of)], [plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)


def run_project(x: Tensor, three: list[Projection], dropout: float) -> tuple[Tensor, ...]:
    return project(x, three[:2], dropout)


def run_mlp(x: Tensor, three: list[Projection], dropout: float) -> Tensor:
    return gated.gated_mlp(x, *three, gated.SILU, dropout)


def run_linear(x: Tensor, three: list[Projection], dropout: float) -> Tensor:
    return linear.add_low_rank(x @ three[0].W.T, x, three[0].A, three[0].B, 0.7, dropout)


@pytest.mark.parametrize("run", [run_project, run_mlp, run_linear])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(run: Callable, dropout: float):
    x = randn(4, 2, 3).requires_grad_()
    three = [as_dtype(p, torch.float64) for p in (grouped(3, 4, 2, 2), grouped(3, 4, 1, 2, seed=10), grouped(4, 3, 2, 2, seed=20))]

    def again(*_: Tensor) -> Tensor | tuple[Tensor, ...]:
        seeds_of(0)
        return run(x, three, dropout)

    used = {run_project: three[:2], run_mlp: three, run_linear: three[:1]}[run]
    assert gradcheck(again, wanted(x, used))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(dtype):
    x, p = randn(96, 64, dtype=dtype).requires_grad_(), as_dtype(grouped(64, 48, 8, 4), dtype, torch.float32)
    exact_x, exact_p = x.detach().double().requires_grad_(), as_dtype(p, torch.float64)
    fast, plain, exact = project(x, [p]), one_by_one(x, [p], 0.0, 0), one_by_one(exact_x, [exact_p], 0.0, 0)
    assert_as_exact(fast, plain, exact)
    for a, b, e in zip(
        gradients(fast, wanted(x, [p])), gradients(plain, wanted(x, [p])), gradients(exact, wanted(exact_x, [exact_p])), strict=True
    ):
        assert a.dtype == b.dtype
        assert_as_exact([a], [b], [e])
