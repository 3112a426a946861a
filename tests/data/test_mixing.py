"""Which rows an epoch has of each data set, and that they are the same whenever they are asked for."""

from __future__ import annotations

from collections import Counter

import pytest

from lorakit.data.mixing import Joined, check_shares, mixture
from lorakit.errors import ConfigError


def test_the_shares_are_those_of_the_rows_of_an_epoch():
    mixed = mixture([70, 1000, 20], [0.2, 0.1])
    assert mixed.drawn == (70, 20, 10)
    assert mixed.rows == 100
    rows = mixed.epoch(seed=0, epoch=0)
    assert rows[:70] == list(range(70))
    assert all(70 <= i < 1070 for i in rows[70:90])
    assert all(1070 <= i < 1090 for i in rows[90:])


def test_each_row_is_drawn_once_before_any_is_drawn_again():
    mixed = mixture([30, 7], [0.25])
    drawn = [i for epoch in range(7) for i in mixed.epoch(3, epoch)[30:]]
    assert len(drawn) == 70
    assert Counter(drawn) == dict.fromkeys(range(30, 37), 10)
    assert drawn[:7] != drawn[7:14]  # another order in each turn


def test_an_epoch_is_a_function_of_seed_and_epoch():
    mixed = mixture([10, 50], [0.5])
    assert mixed.epoch(1, 4) == mixed.epoch(1, 4)
    assert mixed.epoch(1, 4) != mixed.epoch(2, 4)
    assert not set(mixed.epoch(1, 0)[10:]) & set(mixed.epoch(1, 1)[10:])


def test_joined_sets_are_one_sequence_and_stay_apart_when_some_are_selected():
    joined = Joined([["a", "b"], [], ["c", "d", "e"]])
    assert list(joined) == ["a", "b", "c", "d", "e"]
    assert joined.select([1, 3, 4]).parts == [["b"], [], ["d", "e"]]


@pytest.mark.parametrize("shares, said", [({"b": 0.0}, "above 0"), ({"b": 0.6, "c": 0.4}, "leaves nothing")])
def test_impossible_shares_are_an_error(shares, said):
    with pytest.raises(ConfigError, match=said):
        check_shares(shares)
