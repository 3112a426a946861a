"""The largest whole number at which a growing cost stays within a budget, in few evaluations of the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

HALVE = 6  # every so many looks the interval is halved, whatever the costs are like: that makes sure of an end


def largest(cost: Callable[[int], int], budget: int, most: int, slack: float = 0.0) -> int:
    """The largest n in 1..most with cost(n) <= budget, or 0 if there is none. `slack`: it may be smaller by this share.

    Often all fits, which one look at `most` tells. Else: costs here are nearly lines or parabolas, so one through what
    is known tells where they cross the budget. The next look is half a slack before that, and if that fits, the one
    after a slack further, where it should not: then the search is at its end.
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
    """Where the cost comes to the budget, between `low` and `high`: by the line through these, bent to pass the known
    point that is nearest.
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
