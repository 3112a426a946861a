"""Batches that mix adapters: the fast forms against the line they stand for, however the batch is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops.batched import schedule as cut_module
from lorakit.ops.batched.schedule import gathered_already, schedule_rows
from lorakit.ops.batched.segments import add_segments, segments
from lorakit.ops.batched.stacked import add_stacked, chunk_factors, reference

RANKS = [1, 2, 2, 2, 3, 3]  # equal ranks side by side, as a stack has them
SIZE_IN, SIZE_OUT = 4, 3

weights = st.sampled_from([1.0, 1.0, 0.5, -2.0])
row = st.one_of(
    st.just(()),
    st.integers(0, len(RANKS) - 1).map(lambda k: ((k, 1.0),)),
    st.dictionaries(st.integers(0, len(RANKS) - 1), weights, max_size=3).map(lambda uses: tuple(sorted(uses.items()))),
)
batch = st.lists(row, min_size=1, max_size=9)
cost = st.sampled_from([0, 20, 100, 10**9])  # of a chunk's calls: from never merging to a single chunk


def factors_of(ranks: list[int], dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(0)
    return [
        (torch.randn(r, SIZE_IN, generator=made, dtype=dtype), torch.randn(SIZE_OUT, r, generator=made, dtype=dtype))
        for r in ranks
    ]


def inputs(rows: list, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(len(rows), tokens, SIZE_IN, generator=made, dtype=dtype)
    return x, torch.randn(len(rows), tokens, SIZE_OUT, generator=made, dtype=dtype)


def stacked(rows: list, ranks: list[int], tokens: int, dtype: torch.dtype, call: float, gather_below: int = 64):
    """The result of `add_stacked`, and how it was cut, if a chunk's calls cost this."""
    factors, (x, y) = factors_of(ranks, dtype), inputs(rows, tokens, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cut_module.CALL, dtype, call)
        patch.setattr(cut_module, "GATHER_BELOW", gather_below)
        how = schedule_rows(rows, ranks, tokens, SIZE_IN + SIZE_OUT, x)
    parts = chunk_factors(torch.cat([A for A, _ in factors]), torch.cat([B.T for _, B in factors]), how)
    done = y.clone()
    add_stacked(done.view(-1, SIZE_OUT), x.view(-1, SIZE_IN), parts, how)
    return done, how, reference(y, x, factors, rows)


@settings(deadline=None, max_examples=60)
@given(rows=batch, tokens=st.sampled_from([1, 2, 5]), call=cost, gather_below=st.sampled_from([1, 64]))
def test_a_stack_gives_each_row_its_own_update_however_the_batch_is_cut(rows, tokens, call, gather_below):
    done, _, expected = stacked(rows, RANKS, tokens, torch.float64, call, gather_below)
    torch.testing.assert_close(done, expected)


@settings(deadline=None, max_examples=60)
@given(rows=batch, call=cost)
def test_one_token_rows_in_float32(rows, call):
    done, _, expected = stacked(rows, RANKS, 1, torch.float32, call)
    torch.testing.assert_close(done, expected, atol=1e-5, rtol=1e-5)


def uses(*names: int | None) -> list:
    return [() if k is None else ((k, 1.0),) for k in names]


@pytest.mark.parametrize(
    "names, expected", [((0, 1, 2), True), ((1, 1, None, 0), True), ((0, 1, 0), False), ((0, None, 0), False)]
)
def test_rows_of_an_adapter_that_are_adjacent_need_no_gathering_where_calls_are_cheap(names, expected):
    assert gathered_already(uses(*names), torch.empty(0)) is expected
    assert not gathered_already(uses(*names), torch.empty(0, dtype=torch.bfloat16))


def test_mixed_rows_that_share_an_adapter_are_gathered():
    rows = [((0, 0.5), (1, 0.5)), ((0, 0.5), (2, 0.5))]
    assert not gathered_already(rows, torch.empty(0))
    assert gathered_already(rows[:1] + uses(2), torch.empty(0))


def test_adapters_of_equal_rank_are_one_batched_product():
    _, how, _ = stacked(uses(0, 1, 2, 3), [2, 2, 2, 2], 1, torch.float64, 0)
    assert [chunk.adapters for chunk in how.chunks] == [4]


def test_an_adapter_with_fewer_rows_repeats_one_times_zero():
    done, how, expected = stacked(uses(0, 1, 0, 1, 0), [2, 2], 1, torch.float64, 20)
    assert [chunk.adapters for chunk in how.chunks] == [2]
    assert how.order is not None
    assert sorted(how.order.tolist()) == [0, 1, 1, 2, 3, 4]
    torch.testing.assert_close(done, expected)


def test_unequal_ranks_are_one_masked_product_if_calls_are_dear_and_several_if_they_are_cheap():
    rows, ranks = uses(0, 1, None, 2, 0), [1, 2, 3]
    assert len(stacked(rows, ranks, 1, torch.float64, 10**9)[1].chunks) == 1
    assert len(stacked(rows, ranks, 1, torch.float64, 0)[1].chunks) == 3


def test_a_single_masked_product_and_rows_already_sorted_copy_nothing():
    assert stacked(uses(1, 0, None, 1), [1, 2], 1, torch.float64, 10**9)[1].order is None
    assert stacked(uses(0, 0, 1, 2), [1, 2, 3], 1, torch.float64, 0)[1].order is None
    assert stacked(uses(1, 0, 1, 0), [1, 2], 1, torch.float64, 0)[1].order is not None


def test_one_adapter_for_all_rows_needs_no_mask():
    _, how, _ = stacked(uses(1, 1, 1), [1, 2], 3, torch.float64, 0)
    assert [(chunk.tokens, chunk.scale) for chunk in how.chunks] == [(slice(0, 9), 1.0)]
    assert how.order is None


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_an_adapter_that_overflows_changes_its_own_rows_alone(weight):
    rows = [((0, 1.0),), ((1, weight),), (), ((0, 1.0),)]
    factors, (x, y) = factors_of([1, 2]), inputs(rows, 3)
    factors[1] = torch.full_like(factors[1][0], 1e308), factors[1][1]
    for call in (0.0, 1e9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(cut_module.CALL, torch.float64, call)
            how = schedule_rows(rows, [1, 2], 3, SIZE_IN + SIZE_OUT, x)
        done = y.clone()
        parts = chunk_factors(torch.cat([A for A, _ in factors]), torch.cat([B.T for _, B in factors]), how)
        add_stacked(done.view(-1, SIZE_OUT), x.view(-1, SIZE_IN), parts, how)
        fine = [0, 2, 3]
        assert not done[1].isfinite().all()
        torch.testing.assert_close(done[fine], reference(y, x, factors, rows)[fine])


def test_a_row_that_is_not_a_number_stays_alone():
    rows = uses(0, 1, 0, 1, 0)
    factors, (x, y) = factors_of([2, 2]), inputs(rows, 1)
    x[1] = float("nan")
    for call in (0.0, 20.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(cut_module.CALL, torch.float64, call)
            how = schedule_rows(rows, [2, 2], 1, SIZE_IN + SIZE_OUT, x)
        done = y.clone()
        parts = chunk_factors(torch.cat([A for A, _ in factors]), torch.cat([B.T for _, B in factors]), how)
        add_stacked(done.view(-1, SIZE_OUT), x.view(-1, SIZE_IN), parts, how)
        assert done.isnan().any(-1).flatten().tolist() == [False, True, False, False, False]


@settings(deadline=None, max_examples=60)
@given(rows=batch, tokens=st.sampled_from([1, 3, 64]), frozen=st.booleans())
def test_segments_have_the_values_and_gradients_of_the_line(rows, tokens, frozen):
    factors, (x, y) = factors_of(RANKS), inputs(rows, tokens)
    W, bias = torch.randn(SIZE_OUT, SIZE_IN, dtype=torch.float64), torch.randn(SIZE_OUT, dtype=torch.float64)
    used = [k for k in range(len(RANKS)) if any(k == u for r in rows for u, _ in r)]
    wanted = [x.requires_grad_(), *(t.requires_grad_() for k in used for t in factors[k])]
    start = F.linear(x, W, bias) if frozen else (y.requires_grad_() * 1.0)
    expected = reference(start, x, factors, rows)
    how = segments(rows, tokens, x.detach())
    ours = (
        add_segments(None, x, W, bias, how, factors) if frozen else add_segments(y * 1.0, x, None, None, how, factors)
    )
    torch.testing.assert_close(ours, expected)
    if not frozen:
        wanted.append(y)
    g = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, wanted, g, materialize_grads=True)
    for a, e in zip(torch.autograd.grad(ours, wanted, g, materialize_grads=True), theirs, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck_of_segments_that_are_not_in_order(frozen):
    rows = [((0, 1.0),), ((1, 0.5), (2, -1.0)), (), ((0, 1.0),), ((1, 2.0),)]
    factors, (x, y) = factors_of([1, 2, 3]), inputs(rows, 2)
    W = torch.randn(SIZE_OUT, SIZE_IN, dtype=torch.float64)
    how = segments(rows, 2, x)

    def run(x, y, *flat):
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return add_segments(None if frozen else y * 1.0, x, W if frozen else None, None, how, pairs)

    flat = [t.requires_grad_() for pair in factors for t in pair]
    assert gradcheck(run, (x.requires_grad_(), y.requires_grad_(not frozen), *flat))


def test_segments_bring_short_rows_of_one_choice_together_and_leave_long_ones_where_they_are():
    rows = uses(0, 1, 0, 1)
    assert len(segments(rows, 2, torch.zeros(1)).parts) == 2
    assert len(segments(rows, 64, torch.zeros(1)).parts) == 4
    assert segments(rows, 64, torch.zeros(1)).order is None


def test_bf16_inputs_with_float32_factors_give_float32_gradients_near_the_lines():
    rows = uses(0, 1, None, 1, 0)
    factors = [(A.requires_grad_(), B.requires_grad_()) for A, B in factors_of([4, 4], torch.float32)]
    x, y = inputs(rows, 3, torch.bfloat16)
    flat = [t for pair in factors for t in pair]
    ours = add_segments(y.clone(), x, None, None, segments(rows, 3, x), factors)
    expected = reference(y.float(), x.float(), factors, rows)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, atol=0.2, rtol=0.03)
    gradients = torch.autograd.grad(ours.float().sum(), flat)
    for a, e in zip(gradients, torch.autograd.grad(expected.sum(), flat), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, atol=0.2, rtol=0.03)
