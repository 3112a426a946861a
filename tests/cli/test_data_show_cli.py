"""`lorakit data show`: rows with their trained tokens marked, and errors that name file and row."""

from __future__ import annotations

import json

import pytest
import tiny_lm


def test_data_show_marks_trained_tokens_and_prints_the_next_command(lorakit, model, data):
    code, out, _ = lorakit("data", "show", data, "--model", model, "--rows", "2")
    assert code == 0
    first = tiny_lm.rows()[0]
    assert f"{first['prompt']}⟦{first['completion']}</s>⟧" in out
    assert out.count("tokens, ") >= 2
    assert out.splitlines()[-1] == f"next: lorakit train --data {data} --model {model}"


def test_data_show_as_json(lorakit, model, data):
    code, out, _ = lorakit("data", "show", data, "--model", model, "--json", "--max-length", "40")
    told = json.loads(out)
    assert code == 0
    assert (told["rows"], told["shape"], told["max_length"]) == (24, "prompt/completion", 40)
    assert told["dropped"] == sum(len(r["prompt"]) + len(r["completion"]) + 1 > 40 for r in tiny_lm.rows())


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c"\n', "row 2"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n', "row 2: completion is empty"),
        ('{"a": 1}\n', "row 1: unknown shape"),
        ("", "the file is empty"),
        (b'{"prompt": "\xe9"}\n', "line 1: byte 0xe9"),
    ],
)
def test_data_show_names_file_and_row_of_invalid_data(lorakit, model, tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, error = lorakit("data", "show", path, "--model", model)
    assert code == 1
    assert str(path) in error
    assert message in error


def test_data_show_with_other_column_names(lorakit, model, tmp_path):
    path = tiny_lm.write_rows(tmp_path / "qa.jsonl", [{"q": "who?", "a": "me"}])
    assert lorakit("data", "show", path, "--model", model)[0] == 1
    code, out, _ = lorakit("data", "show", path, "--model", model, "--columns", "prompt=q,completion=a")
    assert code == 0
    assert "who?⟦me</s>⟧" in out
