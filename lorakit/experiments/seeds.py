"""Figures over seeds: mean and standard deviation, and paired differences with their 95 % interval.

Runs with the same seed see the same rows in the same order, so settings are compared seed by seed (a paired t-test,
`train/sweep/noise.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and half of its 95 % interval (None for fewer than two seeds)."""

    mean: float
    within: float | None

    @property
    def above_noise(self) -> bool:
        """Whether the interval excludes zero. False if there is none."""
        return self.within is not None and abs(self.mean) > self.within

    def show(self, digits: int = 4) -> str:
        """Format the difference with its interval, and say so if it is within noise."""
        if self.within is None:
            return f"{self.mean:+.{digits}f} (one seed)"
        return f"{self.mean:+.{digits}f} ± {self.within:.{digits}f}" + ("" if self.above_noise else " (noise)")


def difference(own: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare two lists of figures, seed by seed. Raises ValueError if their lengths differ."""
    from ..train.sweep.noise import half_interval

    apart = [a - b for a, b in zip(own, other, strict=True)]
    return Difference(fmean(apart), half_interval(apart))


def show(values: Sequence[float], digits: int = 4) -> str:
    """Format a mean with its standard deviation over the seeds."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
