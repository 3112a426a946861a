"""Rows on disk are the rows that would be in memory, and those alone are read that are asked for."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import datasets
import pytest
import tiny_lm

from lorakit.data.dataset import build, fingerprint, split
from lorakit.data.parse import Row
from lorakit.data.read import read_rows, stream_rows
from lorakit.data.stored import CHUNK, StoredItems, build_stored
from lorakit.errors import DataError

ROWS = tiny_lm.rows(60)
TEXTS = [{"text": "word " * n} for n in (3, 40, 90, 7, 60)]
CHATS = [
    {"messages": [{"role": r, "content": f"{r} {i} {n}"} for n in range(2) for r in ("user", "assistant")]}
    for i in range(9)
]


@pytest.mark.parametrize(
    "rows, how",
    [
        (ROWS, {}),
        (ROWS, {"max_length": 30}),
        (ROWS, {"max_length": 30, "on_long": "cut"}),
        (TEXTS, {"max_length": 64}),
        (CHATS, {}),
        ([{"weight": i % 2, **row} for i, row in enumerate(ROWS)], {}),
    ],
)
def test_the_items_and_what_is_held_out_are_those_of_memory(tmp_path, rows, how):
    file = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = tiny_lm.tokenizer(tiny_lm.CHATML)
    there = build(read_rows(file), tokenizer, **how)
    here = build_stored(stream_rows(file), tokenizer, tmp_path, **how)
    assert isinstance(here.items, StoredItems)
    assert [item.ids for item in here.items] == [item.ids for item in there.items]
    assert fingerprint(here.items) == fingerprint(there.items)
    assert [item.where for item in here.items] == [item.where for item in there.items]
    assert [item.prompt_length for item in here.items] == [item.prompt_length for item in there.items]
    for name in ("shape", "style", "max_length", "max_length_reason", "cut", "dropped", "split", "lengths"):
        assert getattr(here, name) == getattr(there, name), name
    for ours, theirs in zip(split(here.items, 0.2), split(there.items, 0.2)):
        assert [item.ids for item in ours] == [item.ids for item in theirs]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]  # the file has no name


def test_rows_are_read_one_by_one_whatever_holds_them(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(text)
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "c.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "saved", "splits"):
        assert [row.values for row in stream_rows(tmp_path / name)] == ROWS, name
        assert [row.number for row in stream_rows(tmp_path / name)] == list(range(1, 61)), name
        assert [row.values for row in read_rows(tmp_path / name)] == ROWS, name
    assert len(list(stream_rows(tmp_path / "splits", "test"))) == 1
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        list(stream_rows(tmp_path / "splits", "tset"))


def test_a_broken_row_is_named_by_its_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": ')
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3, column \d+: broken JSON"):
        list(stream_rows(file))
    file.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        list(stream_rows(file))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:40])
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(stream_rows(tmp_path / "cut.jsonl.gz"))


def test_a_later_row_of_another_shape_is_named(tmp_path):
    rows = [{"text": "a b"}] * CHUNK + [{"prompt": "a", "completion": "b"}]
    file = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=rf"row {CHUNK + 1}: its shape is"):
        build_stored(stream_rows(file), tiny_lm.tokenizer(), tmp_path)


def test_memory_holds_a_few_numbers_a_row_and_not_the_rows(tmp_path):
    words = "many words " * 200

    def rows():
        for number in range(1, 3001):
            yield Row({"text": f"{number} {words}"}, "made", number)

    tokenizer = tiny_lm.tokenizer()
    tracemalloc.start()
    dataset = build_stored(rows(), tokenizer, tmp_path, max_length=4096)
    _, peak = tracemalloc.get_traced_memory()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(dataset.lengths) > 6_000_000  # tokens; as Python lists of ids, 48 MB and more
    assert held < 3_000_000
    assert peak < 40_000_000  # a chunk of rows
