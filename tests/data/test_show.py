"""What `data show` prints, with and without colour, and its facts for scripts."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lorakit.data.dataset import build
from lorakit.data.show import bins, histogram, report, show


@pytest.fixture
def data(rows, plain_tokenizer):
    pair = {"prompt": "the [red] quick ", "completion": "brown fox"}
    return build(
        rows(
            pair, pair, {"prompt": "the [red] quick ", "completion": "dog"}, {"prompt": "hello", "completion": "world"}
        ),
        plain_tokenizer,
    )


def printed(data, tokenizer, rows=3, **how):
    out = io.StringIO()
    show(data, tokenizer, rows, Console(file=out, width=200, **how))
    return out.getvalue()


def test_trained_text_is_bracketed_where_there_is_no_colour(data, plain_tokenizer):
    text = printed(data, plain_tokenizer)
    assert "the [red] quick ⟦brown fox</s>⟧" in text
    assert "\x1b" not in text
    assert "⟦trained⟧" in text


def test_trained_text_is_coloured_where_there_is_colour(data, plain_tokenizer):
    text = printed(data, plain_tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[1;32mbrown fox</s>\x1b[0m" in text
    assert "⟦" not in text


def test_only_the_requested_rows_are_printed_with_file_and_row(data, plain_tokenizer):
    text = printed(data, plain_tokenizer, rows=2)
    assert "data.jsonl, row 2 (" in text
    assert "data.jsonl, row 3" not in text


def test_the_facts_are_printed(data, plain_tokenizer):
    text = printed(data, plain_tokenizer)
    assert "1 rows repeat an earlier one" in text
    assert "3 rows share a prompt with another completion" in text
    assert "0 of 4 rows, dropped" in text
    assert "1 rows: no space or newline between prompt and completion" in text


def test_the_report_is_json_with_the_datasets_counts(data):
    facts = json.loads(json.dumps(report(data)))
    assert facts["tokens"] == sum(len(item.ids) for item in data.items)
    assert facts["trained_tokens"] == sum(sum(item.trained) for item in data.items)
    assert (facts["rows"], facts["duplicates"], facts["same_prompt"], facts["dropped"]) == (4, 1, 3, 0)
    assert sum(bin["rows"] for bin in facts["histogram"]) == 4


def test_rows_cut_and_dropped_by_the_limit_are_counted(rows, plain_tokenizer):
    long = build(
        rows(
            {"prompt": "1", "completion": "0" * 30},
            {"prompt": "1", "completion": "0"},
            {"prompt": "1" * 30, "completion": "0"},
        ),
        plain_tokenizer,
    )
    assert report(long)["dropped"] == 0
    limited = build([item.row for item in long.items], plain_tokenizer, max_length=8, on_long="cut")
    text = printed(limited, plain_tokenizer)
    assert "8 (as given)" in text
    assert "1 of 3 rows, cut at the end" in text
    assert "1 more dropped" in text


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 2], list(range(1, 100)), [1, 1000]])
def test_every_length_falls_into_one_bin(lengths):
    binned = bins(lengths)
    assert sum(rows for _, _, rows in binned) == len(lengths)
    assert (binned[0][0], binned[-1][1]) == (min(lengths), max(lengths))
    assert len(binned) <= 10


def test_the_limit_is_marked_in_the_histogram():
    lines = histogram([1] * 90 + [100] * 10, limit=50)
    assert sum("max_length" in line for line in lines) == 1
    assert lines[0].count("█") > lines[-1].count("█") > 0
