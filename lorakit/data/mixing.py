"""Mix several data sets: which rows an epoch has of each.

An epoch is one pass over the first data set. Of every other, it has as many rows as its share asks for:

    rows of a set = share / (1 - Σ shares) · rows of the first

They are drawn without replacement until the set is used up, and then again in another order: a small set is seen
several times in an epoch, a large one over several epochs. All is a function of (seed, epoch), so a resumed run draws
the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from lorakit.data.dataset import select, sizes_of
from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """`sizes`: rows of each data set, which lie one after the other; `drawn`: rows that an epoch has of each."""

    sizes: tuple[int, ...]
    drawn: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.drawn)

    def epoch(self, seed: int, epoch: int) -> list[int]:
        """Return the indices of an epoch's rows, those of the first data set first."""
        indices = list(range(self.sizes[0]))
        start = self.sizes[0]
        for number, (size, drawn) in enumerate(zip(self.sizes[1:], self.drawn[1:], strict=True), start=1):
            for position in range(epoch * drawn, (epoch + 1) * drawn):
                turn, at = divmod(position, size)
                indices.append(start + _order(seed, number, turn, size)[at])
            start += size
        return indices


@lru_cache(maxsize=8)
def _order(seed: int, number: int, turn: int, size: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, number, turn)).permutation(size).tolist()
    return order


class Joined(Sequence[Any]):
    """Data sets one after the other. `parts`: each one's items."""

    def __init__(self, parts: Sequence[Sequence[Any]]):
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self.parts[number][index - self._start(number)]

    @property
    def sizes(self) -> list[int]:
        """The tokens of each item."""
        return [size for part in self.parts for size in sizes_of(part)]

    def select(self, indices: Iterable[int]) -> Joined:
        """Return the items with these indices, which are ascending; each stays in its data set."""
        own: list[list[int]] = [[] for _ in self.parts]
        for index in indices:
            number = bisect_right(self._ends, index)
            own[number].append(index - self._start(number))
        return Joined([select(part, mine) for part, mine in zip(self.parts, own, strict=True)])

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0


def mixture(sizes: Sequence[int], shares: Sequence[float]) -> Mixture:
    """Return the mixture of data sets. `sizes`: their rows; `shares`: of all but the first, in the mixture."""
    rest = 1 - sum(shares)
    drawn = [max(1, round(share / rest * sizes[0])) for share in shares]
    return Mixture(tuple(sizes), (sizes[0], *drawn))


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise ConfigError unless the shares are positive and leave something for the first data set."""
    for source, share in shares.items():
        if not 0 < share < 1:
            raise ConfigError(f"mix: the share of '{source}' is {share:g}; expected a number above 0 and below 1")
    if sum(shares.values()) >= 1:
        raise ConfigError(
            f"mix: the shares add up to {sum(shares.values()):g}, which leaves nothing for the first data set\n"
            "  expected less than 1 in all: --data A --mix B=0.3 means 70 % of A and 30 % of B"
        )
