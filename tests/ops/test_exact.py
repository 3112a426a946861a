"""Merging gives every bit back: over dtypes, sizes of ΔW, and values that floats make awkward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import StateError
from lorakit.ops.delta import delta, delta_rows, row_blocks
from lorakit.ops.exact import add_, adding, subtract_

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.clone().view(INTEGERS[weight.dtype])


def matrices(rows: int, columns: int, dtype: torch.dtype, ratio: float, seed: int):
    """A weight of deviation 0.02 and a ΔW `ratio` times as large, in ΔW's own precision."""
    made = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = (torch.randn(rows, columns, generator=made) * 0.02).to(dtype)
    return weight, torch.randn(rows, columns, generator=made, dtype=wide) * 0.02 * ratio


@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 17),
    columns=st.integers(1, 19),
    ratio=st.floats(-6, 2).map(lambda e: 10**e),
    seed=st.integers(0, 10**6),
)
def test_every_bit_comes_back_whatever_the_size_of_the_change(dtype, rows, columns, ratio, seed):
    weight, change = matrices(rows, columns, dtype, ratio, seed)
    before = bits(weight)
    expected = (weight.to(change.dtype) + change).to(dtype)
    undo = add_(weight, adding(lambda r: change[r]))
    assert torch.equal(weight, expected), "the merged weight is W + ΔW, rounded once"
    subtract_(weight, adding(lambda r: change[r]), undo, "w")
    assert torch.equal(bits(weight), before)


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    patterns=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_any_bit_pattern_comes_back(dtype, patterns, seed):
    kind = INTEGERS[dtype]
    size = torch.iinfo(kind).bits
    wrapped = [((p + (1 << (size - 1))) % (1 << size)) - (1 << (size - 1)) for p in patterns]
    weight = torch.tensor(wrapped, dtype=torch.int64).to(kind).view(dtype).view(1, -1)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = change.to(torch.float64 if dtype == torch.float64 else torch.float32)
    before = bits(weight)
    undo = add_(weight, adding(lambda r: change[r]))
    subtract_(weight, adding(lambda r: change[r]), undo, "w")
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, -0.0, 1e-30, 1.0, float("inf")])
def test_zeros_infinities_nans_and_subnormals_come_back(dtype, factor):
    info, kind = torch.finfo(dtype), INTEGERS[dtype]
    odd = torch.tensor(
        [
            0.0,
            -0.0,
            float("inf"),
            -float("inf"),
            float("nan"),
            info.tiny,
            info.tiny / 4,
            -info.tiny / 8,
            info.max,
            info.min,
        ],
        dtype=dtype,
    )
    signalling = odd.view(kind)[4:5] ^ (1 if dtype != torch.float64 else 3)  # NaNs with a payload
    weight = torch.cat([odd, signalling.view(dtype), (signalling | torch.iinfo(kind).min).view(dtype)]).view(2, 6)
    change = torch.full((2, 6), factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before = bits(weight)
    undo = add_(weight, adding(lambda r: change[r]))
    subtract_(weight, adding(lambda r: change[r]), undo, "w")
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio, most", [(0.001, 0.26), (0.1, 0.6), (0.5, 1.0)])
def test_what_is_kept_is_at_most_a_byte_a_weight(dtype, ratio, most):
    weight, change = matrices(256, 256, dtype, ratio, 0)
    undo = add_(weight, adding(lambda r: change[r]))
    assert undo.nbytes() <= most * weight.numel()


def test_a_weight_of_several_blocks_comes_back(monkeypatch):
    weight, change = matrices(37, 8, torch.bfloat16, 0.1, 0)
    monkeypatch.setattr("lorakit.ops.exact.row_blocks", lambda shape: row_blocks(shape, most=40))
    before = bits(weight)
    undo = add_(weight, adding(lambda r: change[r]))
    assert len(undo.blocks) == 8
    subtract_(weight, adding(lambda r: change[r]), undo, "w")
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("shape", [(3,), (3, 0), (4, 2, 3, 3)])
def test_weights_of_any_shape_come_back(shape):
    weight = torch.randn(shape, dtype=torch.float32)
    change = torch.randn(shape).reshape(shape[0], -1)
    before = weight.clone()
    undo = add_(weight, adding(lambda r: change[r]))
    subtract_(weight, adding(lambda r: change[r]), undo, "w")
    assert torch.equal(weight, before)


def test_a_weight_in_another_memory_order_comes_back():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    change = torch.randn(4, 12)
    before = weight.clone()
    undo = add_(weight, adding(lambda r: change[r]))
    torch.testing.assert_close(weight, before + change.view(4, 3, 2, 2))
    subtract_(weight, adding(lambda r: change[r]), undo, "w")
    assert torch.equal(weight, before)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("changed", ["weight", "delta"])
def test_a_change_in_between_is_an_error_that_leaves_the_weight_alone(changed):
    weight, change = matrices(8, 8, torch.bfloat16, 0.1, 0)
    undo = add_(weight, adding(lambda r: change[r]))
    if changed == "weight":
        weight[3, 3] += 1
    else:
        change = change * 1.5
    now = weight.clone()
    with pytest.raises(StateError, match=r"unmerge of 'q_proj' would not restore"):
        subtract_(weight, adding(lambda r: change[r]), undo, "'q_proj'")
    assert torch.equal(weight, now)


def test_many_merges_do_not_wear_the_weight_although_rounding_would():
    weight, _ = matrices(64, 64, torch.bfloat16, 0.1, 0)
    before, worn = bits(weight), weight.clone()
    for cycle in range(20):
        change = matrices(64, 64, torch.bfloat16, 0.1, cycle % 8 + 1)[1]
        undo = add_(weight, adding(lambda r, c=change: c[r]))
        subtract_(weight, adding(lambda r, c=change: c[r]), undo, "w")
        worn = ((worn + change).to(torch.bfloat16) - change).to(torch.bfloat16)
    assert torch.equal(bits(weight), before)
    assert not torch.equal(bits(worn), before), "plain adding and subtracting does drift, so this test can fail"


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 4),
    size_out=st.integers(1, 7),
    size_in=st.integers(1, 7),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_rows_of_delta_are_the_rows_of_the_whole(rank, size_out, size_in, transposed, dtype):
    A, B = torch.randn(rank, size_in).to(dtype), torch.randn(size_out, rank).to(dtype)
    shape = (size_in, size_out) if transposed else (size_out, size_in)
    whole = delta(A, B, 0.5, shape, transposed)
    exact = 0.5 * B.double() @ A.double()
    torch.testing.assert_close(whole.double(), exact.T if transposed else exact, atol=1e-5, rtol=1e-5)
    for rows in row_blocks(shape, most=2 * shape[1]):
        torch.testing.assert_close(delta_rows(A, B, 0.5, rows, transposed), whole[rows])


def test_blocks_without_a_change_take_no_memory_and_keep_their_bits():
    weight = torch.randn(3000, 4096)
    weight[0, :2] = torch.tensor([-0.0, float("nan")])
    before = weight.clone()
    delta = torch.zeros_like(weight)
    delta[2500] = 1.0
    change = adding(lambda rows: delta[rows])
    undo = add_(weight, change)
    assert len(undo.blocks) == 1
    assert undo.nbytes() < 2 * (1 << 20)
    assert torch.equal(weight[:2000].view(torch.int32), before[:2000].view(torch.int32))
    subtract_(weight, change, undo, "it")
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))
