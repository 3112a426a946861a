"""Verdicts on differences of held-out losses, by rules that were fixed before the tables were measured.

    lower        agrees if the interval lies below 0, disagrees if above
    not higher   agrees if it lies below +MARGIN, disagrees if above
    alike        agrees if it lies within ±MARGIN, disagrees if outside

An interval that covers both sides decides nothing: "within noise". A difference that is not significant is therefore
no evidence that two settings are equally good; that takes an interval narrower than the margin.
"""

from __future__ import annotations

from collections.abc import Sequence

from .seeds import Difference
from .suite import Verdict

MARGIN = 0.05  # nats a token: 5 % of the perplexity, less than which is taken as equally good


def lower(apart: Difference) -> Verdict:
    """Judge the claim that the first of two losses is lower."""
    return _judged(apart, below=0.0)


def not_higher(apart: Difference) -> Verdict:
    """Judge the claim that the first of two losses is as good as the second, or better."""
    return _judged(apart, below=MARGIN)


def alike(apart: Difference) -> Verdict:
    """Judge the claim that two losses are equally good: neither better than the other."""
    return joined([not_higher(apart), not_higher(Difference(-apart.mean, apart.within))])


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Judge a claim that holds only if each of its parts does: one part that disagrees refutes it."""
    if "disagrees" in verdicts:
        return "disagrees"
    return "agrees" if all(own == "agrees" for own in verdicts) else "within noise"


def _judged(apart: Difference, below: float) -> Verdict:
    if apart.within is None:
        return "within noise"  # one seed
    if apart.mean + apart.within < below:
        return "agrees"
    return "disagrees" if apart.mean - apart.within > below else "within noise"
