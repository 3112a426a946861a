"""The update as a sampled product and a lookup: each row its own, wherever the adapters lie in the stack."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.ops.batched.sampled import MOST_TOKENS_EACH, add_sampled, pattern, pays
from lorakit.ops.batched.stacked import reference

SIZE_IN, SIZE_OUT, WIDTH = 4, 3, 14
SPANS = [(9, 10), (2, 4), (4, 7), (12, 14)]  # gaps between them, in no order

row = st.one_of(
    st.just(()),
    st.dictionaries(st.integers(0, 3), st.sampled_from([1.0, 0.5, -2.0]), max_size=3).map(
        lambda uses: tuple(sorted(uses.items()))
    ),
)


def stacked(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list]:
    """A stack whose gaps hold NaN, which nothing may read, and its adapters."""
    made = torch.Generator().manual_seed(0)
    A, Bt = torch.full((WIDTH, SIZE_IN), torch.nan, dtype=dtype), torch.full((WIDTH, SIZE_OUT), torch.nan, dtype=dtype)
    for start, stop in SPANS:
        A[start:stop] = torch.randn(stop - start, SIZE_IN, generator=made, dtype=dtype)
        Bt[start:stop] = torch.randn(stop - start, SIZE_OUT, generator=made, dtype=dtype)
    return A, Bt, [(A[slice(*span)], Bt[slice(*span)].T) for span in SPANS]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(row, min_size=1, max_size=9),
    tokens=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_each_row_gets_its_own_update_and_gaps_are_not_read(rows, tokens, dtype):
    A, Bt, factors = stacked(dtype)
    made = torch.Generator().manual_seed(1)
    x = torch.randn(len(rows), tokens, SIZE_IN, generator=made, dtype=dtype)
    y = torch.randn(len(rows), tokens, SIZE_OUT, generator=made, dtype=dtype)
    how, done = pattern(rows, SPANS, tokens, WIDTH, x), y.clone()
    add_sampled(done.view(-1, SIZE_OUT), x.view(-1, SIZE_IN), A, Bt, how)
    expected = reference(y, x, factors, rows)
    torch.testing.assert_close(done, expected)
    again = y.clone()
    add_sampled(again.view(-1, SIZE_OUT), x.view(-1, SIZE_IN), A, Bt, how)  # a pattern serves every layer and step
    assert torch.equal(again, done)


def test_a_row_that_is_not_a_number_stays_alone():
    A, Bt, _ = stacked(torch.float32)
    rows = [((0, 1.0),), ((1, 1.0),), ((0, 1.0),), ()]
    x, y = torch.ones(4, SIZE_IN), torch.zeros(4, SIZE_OUT)
    x[1] = torch.nan
    add_sampled(y, x, A, Bt, pattern(rows, SPANS, 1, WIDTH, x))
    assert y.isnan().any(-1).tolist() == [False, True, False, False]


def test_a_pattern_made_in_inference_mode_serves_outside_of_it():
    A, Bt, factors = stacked(torch.float32)
    rows = [((0, 1.0),), ((2, 0.5),)]
    x, y = torch.ones(2, 1, SIZE_IN), torch.zeros(2, 1, SIZE_OUT)
    with torch.inference_mode():
        how = pattern(rows, SPANS, 1, WIDTH, x)
    done = y.clone()
    with torch.no_grad():
        add_sampled(done.view(2, -1), x.view(2, -1), A, Bt, how)
    torch.testing.assert_close(done, reference(y, x, factors, rows))


def test_it_pays_for_few_tokens_of_several_adapters_on_a_cpu_in_32_bits_or_more():
    few = [((k, 1.0),) for k in (0, 1, 0, 2)]
    x = torch.zeros(1)
    assert pays(few, 1, x)
    assert pays(few, 1, x.double())
    assert not pays(few, 1, x.bfloat16())
    assert not pays(few, 1, x.to("meta"))
    assert not pays([few[0]] * 3, 1, x)  # one adapter is one product
    assert not pays([(), ()], 1, x)
    assert pays(list(itertools.islice(itertools.cycle(few[:2]), 2 * MOST_TOKENS_EACH)), 1, x)
    assert not pays(list(itertools.islice(itertools.cycle(few[:2]), 2 * MOST_TOKENS_EACH + 2)), 1, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_warning_reaches_the_user(dtype, recwarn):
    A, Bt, _ = stacked(dtype)
    x = torch.ones(2, SIZE_IN, dtype=dtype)
    add_sampled(
        torch.zeros(2, SIZE_OUT, dtype=dtype), x, A, Bt, pattern([((0, 1.0),), ((1, 1.0),)], SPANS, 1, WIDTH, x)
    )
    assert not list(recwarn)
