"""Which rows are computed together."""

from __future__ import annotations

from dataclasses import dataclass

import tiny_lm

from lorakit.train.micro import Limit, micro_batches


def rows(*lengths: int) -> list:
    return tiny_lm.items(lengths)


def shape(parts) -> list:
    """(run, length) of each row, part by part."""
    return [[(run, len(item.ids)) for run, item in zip(part.runs, part.items, strict=True)] for part in parts]


def limit(runs: int, own: int = 2, rows: int | None = None, tokens: int | None = None, busy: int = 1 << 30) -> Limit:
    return Limit([own] * runs, rows, tokens, busy)


def test_one_runs_rows_go_by_length_so_many_at_once():
    parts = micro_batches([rows(9, 3, 7, 5, 4)], limit(1))
    assert shape(parts) == [[(0, 3), (0, 4)], [(0, 5), (0, 7)], [(0, 9)]]
    assert [part.counts for part in parts] == [[2], [2], [1]]


def test_runs_share_micro_batches_each_runs_rows_side_by_side_like_lengths_together():
    parts = micro_batches([rows(20, 18), rows(6, 5), rows(19, 20)], limit(3, rows=4))
    assert shape(parts) == [[(1, 5), (1, 6), (0, 18), (0, 20)], [(2, 19), (2, 20)]]
    assert [part.counts for part in parts] == [[2, 2], [2]]


def test_tokens_are_counted_with_their_padding():
    parts = micro_batches([rows(10, 10), rows(10, 11)], limit(2, tokens=33))
    assert shape(parts) == [[(0, 10), (0, 10)], [(1, 10), (1, 11)]]
    assert len(micro_batches([rows(10, 10), rows(10, 11)], limit(2, tokens=44))) == 1


def test_a_run_that_keeps_the_machine_busy_is_computed_as_it_would_be_alone():
    batches = [rows(4), rows(30, 10, 20), rows(5)]
    parts = micro_batches(batches, limit(3, busy=80))
    assert shape(parts) == [[(1, 10), (1, 20)], [(1, 30)], [(0, 4), (2, 5)]]
    assert shape(parts)[:2] == [[(1, n) for _, n in part] for part in shape(micro_batches([batches[1]], limit(1)))]


def test_a_row_longer_than_allowed_is_still_computed_and_an_empty_batch_is_none():
    assert shape(micro_batches([rows(50), [], rows(2)], limit(3, tokens=10))) == [[(0, 50)], [(2, 2)]]


def test_a_run_whose_batch_is_more_than_is_allowed_is_computed_by_itself():
    parts = micro_batches([rows(5, 6, 7), rows(3, 4), rows(2, 2)], limit(3, rows=2, own=2))
    assert shape(parts) == [[(0, 5), (0, 6)], [(0, 7)], [(2, 2), (2, 2)], [(1, 3), (1, 4)]]


def test_rows_of_different_groups_are_never_computed_together():
    @dataclass(frozen=True)
    class Picture:
        size: int
        group: tuple[int, int]

    batch = [Picture(6, (2, 3)), Picture(4, (2, 2)), Picture(6, (3, 2)), Picture(6, (2, 3))]
    parts = micro_batches([batch, batch[:2]], limit(2, own=8, rows=8))
    assert all(len({item.group for item in part.items}) == 1 for part in parts)
    assert sorted(len(part.items) for part in parts) == [1, 2, 3]
    assert parts[0].rows_by_run() == [[batch[0], batch[3]], [batch[0]]]
