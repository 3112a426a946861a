"""The means of further figures that a task logs of a step's rows, such as the rewards of answers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .parallel import Parallel


class Logged:
    """Sums up figures of a step's rows by name, over micro-batches and processes."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel
        self._sums: dict[str, Tensor] = {}  # name -> [2]: the sum, and the number of rows that it concerns

    def add(self, name: str, values: Tensor, counts: bool) -> None:
        """Take in a figure of some rows, [rows], NaN where it does not concern a row. `counts`: whether these rows are
        this process's own; one without rows of its own computes one for nothing.
        """
        concerned = ~values.isnan() & counts
        sums = torch.stack([values.masked_fill(~concerned, 0).sum(), concerned.sum()]).float()
        self._sums[name] = self._sums.get(name, torch.zeros_like(sums)) + sums

    def means(self) -> dict[str, float]:
        """Return the mean of each figure over the rows of all processes that it concerns; none without such rows."""
        if not self._sums:
            return {}
        sums = self._parallel.mean(torch.stack(list(self._sums.values()))).tolist()
        means = {name: total / count for name, (total, count) in zip(self._sums, sums, strict=True) if count}
        return {name: value for name, value in means.items() if math.isfinite(value)}
