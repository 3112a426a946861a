"""Whether all elements are finite is told by a sum; looking at each element is the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.adapter.checks import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_tells_what_each_element_does(dtype):
    largest = torch.finfo(dtype).max
    cases = {
        "ordinary": torch.randn(50, generator=torch.manual_seed(1)),
        "a sum that overflows": torch.full((9,), largest, dtype=dtype),
        "sums that cancel": torch.tensor([largest, largest, -largest, -largest], dtype=dtype),
        "NaN": torch.tensor([1.0, math.nan]),
        "infinity": torch.tensor([1.0, -math.inf]),
        "both infinities": torch.tensor([math.inf, -math.inf]),
        "nothing": torch.zeros(0),
    }
    for what, values in cases.items():
        assert all_finite(values.to(dtype)) == bool(torch.isfinite(values.to(dtype)).all()), what


def test_what_has_no_values_yet_counts_as_finite():
    assert all_finite(torch.empty(3, device="meta"))
