"""What rows of every labelled task have alike: columns under our names, weights, and what happened to long ones.

A task's reader makes a `RowSet` of its rows; `tasks/text/headed.py` makes a run's data of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, did_you_mean, listing
from .dataset import LEFT_OUT, unused_columns
from .parse import Row
from .shapes import WEIGHT, weighs


@dataclass(frozen=True)
class RowSet:
    """A data set's items, and what happened on the way.

    about: what the result's metadata keeps of the data, such as label names. lengths: tokens of each row, before the
    limit. cut, dropped, split: rows over the limit, by what was done with them. notes: message -> rows it concerns.
    """

    items: list[Any]
    shape: str
    about: dict[str, Any]
    max_length: int
    max_length_reason: str
    lengths: list[int]
    cut: int = 0
    dropped: int = 0
    split: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The labels' names, by id; empty where there are none."""
        return list(self.about.get("labels", ()))


def weighed(rows: Sequence[Row], columns: Mapping[str, str], known: Sequence[str]) -> tuple[list[Row], dict[str, int]]:
    """Return the rows whose weight is not 0, and notes on those and on columns that nothing reads.

    columns: our name -> the file's; known: our names, and others' for the same. Raises DataError if no row is left.
    """
    read = {*(name for name in known if name not in columns), *columns.values(), WEIGHT}
    notes = unused_columns([[n for n, v in row.values.items() if v is not None and n not in read] for row in rows])
    kept = [row for row in rows if WEIGHT in columns.values() or weighs(dict(row.values), row)]
    if not kept:
        raise DataError(f"{rows[0].file}: every row has {WEIGHT} 0, so there is nothing to train on")
    if len(kept) < len(rows):
        notes[LEFT_OUT] = len(rows) - len(kept)
    return kept, notes


def fields_of(
    row: Row, columns: Mapping[str, str], known: Sequence[str], required: Sequence[str], expected: str
) -> dict[str, Any]:
    """Return a row's values under our names; None for columns that it lacks.

    columns: our name -> the file's; expected: the columns that make a row, for messages. Raises DataError for an
    unknown name in `columns`, a column that is not there, and a row without a required value.
    """
    for ours, theirs in columns.items():
        if ours not in known:
            raise DataError(
                f"columns: '{ours}' is not a column of labelled rows{did_you_mean(ours, known)}\n"
                f"  known: {', '.join(known)}"
            )
        if theirs not in row.values:
            raise DataError(
                f"{row.where}: no column '{theirs}' (columns: {ours}: {theirs}){did_you_mean(theirs, row.values)}"
            )
    values = {name: row.values.get(columns.get(name, name)) for name in known}
    missing = next((name for name in required if values[name] is None), None)
    if missing is not None:
        shown = ", ".join(f"{name}: ..." for name in required)
        raise DataError(
            f"{row.where}: no {missing}; columns found: {listing(row.values, 20) or 'none'}\n"
            f"  expected {expected}; or say which column is which: columns: {{{shown}}}"
        )
    return values


def check_longest(rows: Sequence[Row], items: Sequence[Any], limit: int, reason: str) -> None:
    """Raise DataError if every row was dropped for its length."""
    if not items:
        raise DataError(
            f"{rows[0].file}: every row is longer than max_length {limit} ({reason})\n"
            "  raise max_length, or use on_long: cut"
        )
