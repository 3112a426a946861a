"""The largest whole number at which a growing cost stays within a budget, in few evaluations of the cost."""

from __future__ import annotations

from collections.abc import Callable


def largest(cost: Callable[[int], int], budget: int, most: int, slack: float = 0.0) -> int:
    """The largest n in 1..most with cost(n) <= budget, or 0 if there is none. `slack`: it may be smaller by this share.

    Costs here are nearly straight lines, so a line through what is known tells where to look next; halving now and then makes sure
    of an end.
    """
    low, at_low = 1, cost(1)
    if at_low > budget:
        return 0
    if most == 1:
        return 1
    # Beyond `most` nothing is asked for; its cost is drawn from the first two until something is known not to fit.
    high, at_high = most + 1, at_low + max(1, cost(2) - at_low) * most
    looks = 0
    while high - low > max(1, int(low * slack)):
        guess = (low + high) // 2
        if looks % 4 < 3 and at_high > at_low:
            guess = low + (high - low) * (budget - at_low) // (at_high - at_low)
            guess += looks % 2  # just above the last look: where the line was right, that ends the search
        if looks == 1 and high > most:
            guess = most  # the first guess fitted: perhaps all does
        guess = min(max(guess, low + 1), high - 1)
        value = cost(guess)
        if value <= budget:
            low, at_low = guess, value
        else:
            high, at_high = guess, value
        looks += 1
    return low
