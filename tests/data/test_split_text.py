"""Texts split into prompt and answer at a marker: the last one, in every row, or the row is named."""

from __future__ import annotations

import pytest

from lorakit.data.parse import Row
from lorakit.data.split_text import answered
from lorakit.errors import DataError


def rows(*values):
    return [Row(dict(each), "rows.jsonl", number) for number, each in enumerate(values, start=1)]


def test_the_answer_follows_the_last_marker():
    (row,) = answered(rows({"text": "A: is a letter\nA: SELECT 1", "id": 3}), "A:")
    assert row.values == {"id": 3, "prompt": "A: is a letter\nA:", "completion": " SELECT 1"}
    assert row.where == "rows.jsonl, row 1"
    (row,) = answered(rows({"body": "x=y"}), "=", {"text": "body"})
    assert row.values == {"prompt": "x=", "completion": "y"}
    (row,) = answered(rows({"text": "a"}), None)
    assert row.values == {"text": "a"}


@pytest.mark.parametrize(
    ("values", "said"), [({"text": "b"}, r"row 2: its text has no 'A:'"), ({"q": "b"}, "no column 'text'")]
)
def test_a_row_without_it_is_named(values, said):
    with pytest.raises(DataError, match=said):
        list(answered(rows({"text": "A: x"}, values), "A:"))
