"""Rows of one text as prompt and answer, where a marker stands before each answer.

{"text": "Q: 2 + 2?\nA: 4"}, marker "A:"   →   {"prompt": "Q: 2 + 2?\nA:", "completion": " 4"}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from lorakit.data.parse import Row
from lorakit.errors import DataError


def without_text(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return the columns (ours -> the file's) of rows that have been split: without that of the text."""
    return {ours: theirs for ours, theirs in (columns or {}).items() if ours != "text"}


def answered(rows: Iterable[Row], marker: str | None, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield each row split behind the last `marker` of its text; the rows themselves for None.

    columns: our column name -> the file's. Raises DataError, naming the row, for one without text or without marker.
    """
    name = (columns or {}).get("text", "text")
    for row in rows:
        if marker is None:
            yield row
            continue
        text = row.values.get(name)
        if not isinstance(text, str):
            raise DataError(
                f"{row.where}: no column '{name}', so there is nothing to split at {marker!r} (answer_after)\n"
                "  omit answer_after: it is for rows of one text that has the prompt and the answer"
            )
        before, found, after = text.rpartition(marker)
        if not found:
            raise DataError(
                f"{row.where}: its text has no {marker!r} (answer_after): {text[:60]!r}\n"
                "  give what stands before the answer in every row, or complete the row"
            )
        rest = {other: value for other, value in row.values.items() if other != name}
        yield replace(row, values=rest | {"prompt": before + found, "completion": after})
