"""Find the largest integer at which a growing cost stays within a budget, with few evaluations of the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

HALVE = 6  # bisect at every sixth evaluation, which bounds the search whatever the cost looks like


def largest(cost: Callable[[int], int], budget: int, most: int, slack: float = 0.0) -> int:
    """Return the largest n in 1..most with cost(n) <= budget, 0 if there is none. `slack`: n may be too small by this
    share.

    `most` is tried first, as it often fits. Otherwise: costs here are nearly linear or quadratic in n, so a curve
    through the known points predicts where they cross the budget. The next n lies half a slack below the crossing. If
    it fits, the one after lies a slack higher, where it should not fit, and the search ends.
    """
    known = {most: cost(most)}
    if known[most] <= budget:
        return most
    if most == 1:
        return 0
    known[1] = cost(1)
    if known[1] > budget:
        return 0
    low, high = 1, most  # fits, does not fit
    while high - low > (step := max(1, int(low * slack))):
        guess = (low + high) / 2 if len(known) % HALVE == 0 else _crossing(known, budget, low, high) - step / 2
        n = min(max(int(guess), low + step), high - 1)
        known[n] = cost(n)
        if known[n] <= budget:
            low = n
        else:
            high = n
    return low


def _crossing(known: Mapping[int, int], budget: int, low: int, high: int) -> float:
    """Predict where the cost reaches the budget, between `low` and `high`: on the line through these two points, or the
    parabola through them and the nearest other known point.
    """
    slope = (known[high] - known[low]) / (high - low)
    missing = budget - known[low]
    if slope <= 0:
        return (low + high) / 2
    straight = low + missing / slope
    third = min((n for n in known if n not in (low, high)), key=lambda n: abs(n - straight), default=None)
    if third is None:
        return straight
    # cost(low + m) = cost(low) + slope · m + curve · m · (m - (high - low))
    curve = ((known[third] - known[low]) / (third - low) - slope) / (third - high)
    linear = slope - curve * (high - low)
    root = linear * linear + 4 * curve * missing
    if root < 0 or linear + math.sqrt(root) <= 0:
        return straight
    m = 2 * missing / (linear + math.sqrt(root))
    return low + m if m <= high - low else straight
