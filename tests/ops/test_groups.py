"""Rows in groups, each with an adapter of its own, against each group by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from against import DTYPES, as_dtype, assert_as_exact, gradients, keep, mask_of, projection, randn, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from lorakit.ops import linear, projections
from lorakit.ops.dropout import Mask, kept_share
from lorakit.ops.fused import gated_mlp as gated
from lorakit.ops.projections import Projection, project


def grouped(size_in: int, size_out: int, rank: int, groups: int, seed: int = 0) -> Projection:
    """One weight, and as many updates as there are groups."""
    each = [projection(size_in, size_out, rank, seed=seed + 100 * g) for g in range(groups)]
    A, B = (torch.stack([p[i] for p in each]) for i in (2, 3))
    return each[0]._replace(A=A, B=B)


def one_by_one(x: Tensor, p: Projection, mask: Mask | None) -> Tensor:
    """The plain lines for each group of x: [rows, ..., in], with the mask of all of x."""
    groups = p.A.shape[0]
    kept = keep(x, mask).chunk(groups) if mask else [None] * groups
    share = kept_share(mask.p) if mask else 1.0
    own = [p._replace(A=p.A[g], B=p.B[g]) for g in range(groups)]
    return torch.cat(
        [projections.reference(rows, [o], k, share)[0] for rows, o, k in zip(x.chunk(groups), own, kept, strict=True)]
    )


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 3),
    tokens=st.integers(1, 3),
    rank=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.4]),
    turned=st.booleans(),
)
def test_the_projection_of_each_group_is_that_of_its_adapter(groups, rows, tokens, rank, dropout, turned):
    x = randn(groups * rows, tokens, 5)
    x = (x.transpose(1, 2).contiguous().transpose(1, 2) if turned else x).requires_grad_()
    p, mask = as_dtype(grouped(5, 3, rank, groups), torch.float64), mask_of(x, dropout)
    fast, plain = project(x, p, mask), one_by_one(x, p, mask)
    of = wanted(x, [p])
    for a, e in zip([fast, *gradients(fast, of)], [plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)


def mlp(x: Tensor, linears: list[Projection]) -> Tensor:
    """The equation for each group."""
    own = [[p._replace(A=p.A[g], B=p.B[g]) for p in linears] for g in range(linears[0].A.shape[0])]
    return torch.cat(
        [
            gated.reference(rows, some[:-1], some[-1], gated.SILU)
            for rows, some in zip(x.chunk(len(own)), own, strict=True)
        ]
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_gated_mlp_of_groups_is_that_of_each_group(packed):
    x = randn(6, 4, 8).requires_grad_()
    gate_up = [grouped(8, 24, 2, 3)] if packed else [grouped(8, 12, 2, 3), grouped(8, 12, 3, 3, seed=10)]
    linears = [as_dtype(p, torch.float64) for p in (*gate_up, grouped(12, 8, 5, 3, seed=20))]
    fast, plain = gated.gated_mlp(x, linears[:-1], linears[-1], gated.SILU), mlp(x, linears)
    of = wanted(x, linears)
    for a, e in zip([fast, *gradients(fast, of)], [plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(0, 3),
    dropout=st.sampled_from([0.0, 0.4]),
    base_takes_gradients=st.booleans(),
)
def test_updates_added_to_a_given_output_are_those_of_each_group(groups, rows, dropout, base_takes_gradients):
    x, y = (
        randn(groups * rows, 2, 5).requires_grad_(),
        randn(groups * rows, 2, 4, seed=1).requires_grad_(base_takes_gradients),
    )
    p = as_dtype(grouped(5, 4, 3, groups), torch.float64)
    mask = mask_of(x, dropout)
    fast = linear.add_low_rank(y * 1.0, x, p.A, p.B, p.scale, mask)
    zero = p._replace(W=torch.zeros_like(p.W), bias=None)
    plain = y + one_by_one(x, zero, mask) if rows else y * 1.0 + 0 * x.sum()
    of = [*wanted(x, [p]), *([y] if base_takes_gradients else [])] if rows else [x]
    for a, e in zip([fast, *gradients(fast, of)], [plain, *gradients(plain, of)], strict=True):
        torch.testing.assert_close(a, e)


def run_project(x: Tensor, three: list[Projection], mask: Mask | None) -> Tensor:
    return project(x, three[0], mask)


def run_mlp(x: Tensor, three: list[Projection], mask: Mask | None) -> Tensor:
    torch.manual_seed(0)  # it draws a mask of its own for h
    return gated.gated_mlp(x, three[:2], three[2], gated.SILU, mask)


def run_linear(x: Tensor, three: list[Projection], mask: Mask | None) -> Tensor:
    return linear.add_low_rank(x @ three[0].W.T, x, three[0].A, three[0].B, 0.7, mask)


@pytest.mark.parametrize("run", [run_project, run_mlp, run_linear])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(run: Callable, dropout: float):
    x = randn(4, 2, 3).requires_grad_()
    three = [
        as_dtype(p, torch.float64)
        for p in (grouped(3, 4, 2, 2), grouped(3, 4, 1, 2, seed=10), grouped(4, 3, 2, 2, seed=20))
    ]
    used = three if run is run_mlp else three[:1]
    # The same mask drawn each time, as each forward has: gradcheck writes into x behind autograd's back.
    assert gradcheck(lambda *_: run(x, three, mask_of(x, dropout)), wanted(x, used))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(dtype):
    x, p = randn(96, 64, dtype=dtype).requires_grad_(), as_dtype(grouped(64, 48, 8, 4), dtype, torch.float32)
    exact_x, exact_p = x.detach().double().requires_grad_(), as_dtype(p, torch.float64)
    fast, plain, exact = project(x, p), one_by_one(x, p, None), one_by_one(exact_x, exact_p, None)
    assert_as_exact([fast], [plain], [exact])
    of, exact_of = wanted(x, [p]), wanted(exact_x, [exact_p])
    for a, b, e in zip(gradients(fast, of), gradients(plain, of), gradients(exact, exact_of), strict=True):
        assert a.dtype == b.dtype
        assert_as_exact([a], [b], [e])
