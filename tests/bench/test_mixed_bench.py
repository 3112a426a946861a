"""What the steps of `lorakit bench mixed` name: the change is the only difference."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from lorakit.bench.mixed import RANKS, mixes

NAMES = [f"adapter{i}" for i in range(400)]


def ranks(mix: list[str]) -> list[int]:
    return [RANKS[NAMES.index(name) % len(RANKS)] for name in mix]


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("kind, changed", [("steady", 0), ("one", 1), ("all", None)])
def test_each_step_changes_as_many_adapters_as_it_says_for_others_of_the_same_rank(kind, changed, count):
    steps = list(islice(mixes(NAMES, count, kind), 100))
    for before, now in pairwise(steps):
        assert len(set(now)) == count
        assert ranks(now) == ranks(before) == [RANKS[k % len(RANKS)] for k in range(count)]
        assert len(set(now) - set(before)) == (count if changed is None else changed)
