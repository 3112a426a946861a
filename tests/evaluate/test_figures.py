"""Measures in a table: those that are known, each with its digits, and no surprise from an untrusted file."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from lorakit.evaluate.figures import measured, show, table


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("loss", 1.23456, "1.2346"),
        ("perplexity", 1234.5, "1,234.50"),
        ("perplexity", math.inf, "inf"),
        ("bleu", 61.55, "61.5"),
        ("loss", math.nan, ""),
        ("loss", None, ""),
        ("loss", True, ""),
        ("loss", "<b>", ""),
    ],
)
def test_a_measure_has_its_digits_and_anything_else_is_blank(key, value, text):
    assert show(key, value) == text


def test_a_column_stands_for_each_measure_that_some_result_has():
    rows = [{"adapter": None, "loss": 2.0}, {"adapter": "[b]", "loss": 1.0, "accuracy": 0.5, "other": 3}]
    assert measured(rows) == ["loss", "accuracy"]
    out = io.StringIO()
    Console(file=out, width=80).print(table(rows, "2 rows", "base"))
    for word in ("2 rows", "base", "[b]", "2.0000", "0.5000"):
        assert word in out.getvalue()
