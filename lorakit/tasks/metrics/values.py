"""Measures of predicted numbers: mean squared error, Pearson's and Spearman's correlation. As SciPy computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_squared_error(truth: Sequence[float], predicted: Sequence[float]) -> float:
    """Return the mean of (prediction − truth)², in the square of the values' unit. Raises ValueError without rows."""
    if not truth:
        raise ValueError("no rows to measure; expected one at least")
    return math.fsum((p - t) ** 2 for t, p in zip(truth, predicted, strict=True)) / len(truth)


def pearson(truth: Sequence[float], predicted: Sequence[float]) -> float:
    """Return Pearson's correlation, -1 to 1; NaN where it is not defined: one row, or all values the same."""
    count = len(truth)
    mean_t, mean_p = math.fsum(truth) / max(1, count), math.fsum(predicted) / max(1, count)
    pairs = [(t - mean_t, p - mean_p) for t, p in zip(truth, predicted, strict=True)]
    spread = math.sqrt(math.fsum(t * t for t, _ in pairs)) * math.sqrt(math.fsum(p * p for _, p in pairs))
    return math.fsum(t * p for t, p in pairs) / spread if count > 1 and spread > 0 else math.nan


def spearman(truth: Sequence[float], predicted: Sequence[float]) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks. NaN where that is not defined."""
    return pearson(ranks(truth), ranks(predicted))


def ranks(values: Sequence[float]) -> list[float]:
    """Return each value's rank, from 1; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            found[order[place]] = (start + end) / 2 + 1
        start = end + 1
    return found
