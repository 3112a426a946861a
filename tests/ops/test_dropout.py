"""Dropout's masks: as random as they claim, the same again from the same seed, and unbiased in what they do to the
update.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from against import projection, randn, seeds_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.ops.dropout import draw_mask, draw_seed, kept_share, masked, scaled
from lorakit.ops.projections import project, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def kept(shape: tuple[int, ...], p: float, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.ones(shape, dtype=dtype)
    return masked(x, draw_mask(x, p, seed)) != 0


def within(found: float, expected: float, n: int) -> None:
    """Whether a share of n draws lies within five deviations of its probability."""
    assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / n) + 1e-12, (found, expected)


@pytest.mark.parametrize("p", [0.001, 0.03, 0.05, 0.1, 1 / 3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_the_share_that_is_kept_is_binomial(p, seed):
    mask = kept((513, 401), p, seed)
    within(mask.double().mean(), kept_share(p), mask.numel())
    within(mask[:, 0].double().mean(), kept_share(p), 513)


@settings(max_examples=300, deadline=None)
@given(p=st.floats(0, 1, exclude_max=True))
def test_p_is_rounded_by_two_percent_or_the_finest_step_at_most(p):
    share = kept_share(p)
    assert abs((1 - share) - p) <= max(0.02 * p, 0.5 / 65536) + 1e-12
    assert 0 < share <= 1


@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.25, 0.3, 0.5])
def test_for_the_usual_p_eight_random_bits_an_element_are_enough(p):
    assert kept_share(p) * 256 == round(kept_share(p) * 256)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.001])
def test_neighbouring_elements_are_dropped_independently(p):
    mask, keep = kept((200_003,), p, 5), kept_share(p)
    for lag in range(1, 10):  # four or eight elements come from one draw
        within((mask[lag:] & mask[:-lag]).double().mean(), keep**2, mask.numel() - lag)


def test_the_masks_of_different_seeds_are_independent():
    seeds_of(0)
    seeds = [0, 1, 2, 1 << 32, (1 << 32) + 1, draw_seed(), draw_seed()]
    masks = [kept((40_001,), 0.5, s) for s in seeds]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            within((one == other).double().mean(), 0.5, one.numel())


def test_one_seed_is_one_mask_for_every_type_and_layout():
    first = kept((7, 5), 0.4, 11)
    for dtype in DTYPES:
        assert torch.equal(kept((7, 5), 0.4, 11, dtype), first)
    for x in (torch.ones(5, 7).T, torch.ones(1, 5).expand(7, 5), torch.ones(7, 10)[:, ::2]):
        assert torch.equal(masked(x, draw_mask(x, 0.4, 11)) != 0, first)
    flat = torch.ones(35)
    assert torch.equal(masked(flat, draw_mask(torch.ones(7, 5), 0.4, 11)).view(7, 5) != 0, first), (
        "of the same elements as rows"
    )


def test_torchs_own_seed_governs_the_draws():
    first, again = ([*seeds_of(3)], [*seeds_of(3)])
    assert first == again
    assert len(set(first)) == 3
    assert seeds_of(3, seed=4) != first
    assert all(0 <= s < 1 << 62 for s in first)


@pytest.mark.parametrize("p", [0.5, 0.001])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1001])
def test_a_mask_takes_one_bit_an_element(size, p):
    state = draw_mask(torch.empty(size), p, 3).state
    assert (state.dtype, state.shape) == (torch.uint8, (math.ceil(size / 8),))
    assert state.untyped_storage().nbytes() == state.numel()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1001])
def test_odd_sizes_have_every_element_kept_half_of_the_time(size):
    share = torch.stack([kept((size,), 0.5, s) for s in range(400)]).double().mean(0)
    assert (share - 0.5).abs().max() <= 5.5 * math.sqrt(0.25 / 400)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_to_drop_is_no_error(shape):
    x = torch.empty(shape)
    assert masked(x, draw_mask(x, 0.5, 1)).shape == shape


@pytest.mark.parametrize("p", [0.999999, 1 - 1e-12])
def test_at_the_end_of_the_range_the_scale_stays_finite(p):
    assert kept_share(p) > 0
    within(kept((100, 10_000), p, 3).double().mean(), kept_share(p), 1_000_000)


def test_below_the_finest_step_nothing_is_dropped_and_nothing_scaled():
    assert kept_share(1e-9) == 1
    assert kept((1000,), 1e-9, 3).all()


layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    size=st.integers(1, 9),
    layout=layouts,
    dtype=st.sampled_from(DTYPES),
    p=st.floats(0, 1, exclude_max=True),
)
def test_what_is_kept_keeps_its_bits_and_the_rest_is_zero(rows, size, layout, dtype, p):
    x = {
        "plain": randn(rows, size, dtype=dtype),
        "transposed": randn(size, rows, dtype=dtype).T,
        "strided": randn(rows, 2 * size, dtype=dtype)[:, ::2],
        "expanded": randn(1, size, dtype=dtype).expand(rows, size),
    }[layout]
    before = x.clone()
    dropped = masked(x, draw_mask(x, p, 17))
    assert torch.equal(dropped, torch.where(kept((rows, size), p, 17), x, torch.zeros_like(x)))
    assert dropped.dtype == dtype
    assert torch.equal(x, before)
    if x.numel():
        assert dropped.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_infinity_is_zero(dtype):
    x = torch.full((1000,), float("inf"), dtype=dtype)
    assert set(masked(x, draw_mask(x, 0.5, 2)).tolist()) == {0.0, float("inf")}


def test_scaled_is_dropout_that_autograd_follows():
    x = randn(6, 5).requires_grad_()
    mask = draw_mask(x, 0.3, 4)
    y = scaled(x, mask)
    expected = torch.where(kept((6, 5), 0.3, 4), 1 / kept_share(0.3), 0.0).double()
    torch.testing.assert_close(y, x * expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planning_on_meta_and_with_fake_tensors_gives_shapes_and_sizes(dtype):
    for planned in (nullcontext(), FakeTensorMode()):
        with planned:
            x = torch.empty(6, 5, dtype=dtype, device="meta" if isinstance(planned, nullcontext) else "cpu")
            mask = draw_mask(x, 0.5, 1)
            dropped = masked(x, mask)
            assert (dropped.shape, dropped.dtype, dropped.device) == ((6, 5), dtype, x.device)
            assert (mask.state.shape, mask.state.dtype) == ((4,), torch.uint8)


def test_the_update_is_unbiased():
    x, p = randn(3, 16), projection(16, 4, 2)
    whole = reference(x, [p])[0]
    seeds_of(0, seed=8)
    draws = torch.stack([project(x, p, draw_mask(x, 0.3, draw_seed())) for _ in range(4000)])
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - whole).abs() <= 5 * deviation).all()
