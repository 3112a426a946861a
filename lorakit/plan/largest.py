"""The largest whole number at which a growing cost stays within a budget, in few evaluations of the cost."""

from __future__ import annotations

from collections.abc import Callable


def largest(cost: Callable[[int], int], budget: int, most: int, slack: float = 0.0) -> int:
    """The largest n in 1..most with cost(n) <= budget, or 0 if there is none. `slack`: it may be smaller by this share.

    Often all fits, which one look at `most` tells. Else: costs here are nearly straight lines, so a line through what is known tells
    where to look next, and never nearer to what fitted than `slack`, so that a look there ends the search where the line was right.
    Halving now and then makes sure of an end.
    """
    at_high = cost(most)
    if at_high <= budget:
        return most
    low, high, looks = 1, most, 0
    if most == 1 or (at_low := cost(1)) > budget:
        return 0
    while high - low > (step := max(1, int(low * slack))):
        guess = (low + high) // 2
        if looks % 4 < 3 and at_high > at_low:
            guess = low + (high - low) * (budget - at_low) // (at_high - at_low)
        guess = min(max(guess, low + step), high - 1)
        value = cost(guess)
        if value <= budget:
            low, at_low = guess, value
        else:
            high, at_high = guess, value
        looks += 1
    return low
