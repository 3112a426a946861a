"""Measures of rankings: where the right answer stands among all candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ranks_of(scores: Tensor, right: Tensor) -> list[int]:
    """Return the rank, from 1, of each query's right candidate.

    scores: [queries, candidates], higher is better; right: [queries], the index of the right candidate. Candidates with
    the same score as the right one stand before it, so that a model that scores everything alike finds nothing.
    """
    own = scores.gather(1, right[:, None])
    ranks: list[int] = (scores >= own).sum(1).tolist()  # itself included
    return ranks


def recall_at(ranks: Sequence[int], k: int) -> float:
    """Return the share of queries whose right candidate is among the first k. Raises ValueError without queries."""
    if not ranks:
        raise ValueError("no queries to measure; expected one at least")
    return sum(rank <= k for rank in ranks) / len(ranks)
