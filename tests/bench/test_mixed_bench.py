"""The steps of `lorakit bench mixed` differ in nothing but which adapters change."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from lorakit.bench.mixed import RANKS, mixes

NAMES = [f"adapter{i}" for i in range(400)]


def ranks(mix: list[str]) -> list[int]:
    return [RANKS[NAMES.index(name) % len(RANKS)] for name in mix]


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("kind, changed", [("steady", 0), ("one", 1), ("all", None)])
def test_each_step_replaces_the_stated_number_of_adapters_by_others_of_equal_rank(kind, changed, count):
    steps = list(islice(mixes(NAMES, count, kind), 100))
    for before, now in pairwise(steps):
        assert len(set(now)) == count
        assert ranks(now) == ranks(before) == [RANKS[k % len(RANKS)] for k in range(count)]
        assert len(set(now) - set(before)) == (count if changed is None else changed)
