"""Rows of one text whose answers follow a marker, such as the mlx examples' WikiSQL: trained, evaluated, predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_lm

from lorakit.cli import run
from lorakit.data.dataset import build
from lorakit.data.read import read_rows
from lorakit.data.split_text import answered
from lorakit.tasks.text.prompts_of import prompts_of
from lorakit.train.setup import set_up

WIKISQL = Path(__file__).parents[1] / "fixtures" / "wikisql"


@pytest.fixture
def texts(tmp_path):
    values = [{"text": f"Q: {row['prompt'].strip()}\nA: {row['completion']}", "id": 1} for row in tiny_lm.rows()]
    return tiny_lm.write_rows(tmp_path / "texts.jsonl", values)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_answer_is_trained(streaming, make_config, texts):
    job = set_up(make_config(data=texts, answer_after="A:", streaming=streaming))
    for item in list(job.train)[:4]:
        assert job.base.processor.decode(item.ids[: item.prompt_length]).endswith("\nA:")
        assert all(item.trained[item.prompt_length :])


def test_eval_and_predict_ask_up_to_the_marker(texts, model_folder, capsys):
    flags = ["--model", str(model_folder), "--answer-after", "A:", "--limit", "3", "--max-new-tokens", "4"]
    assert run(["eval", str(texts), *flags, "--json", "--normalize"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [sample["prompt"][-3:] for sample in found["samples"]] == ["\nA:"] * 3
    assert found["samples"][0]["references"] == ["Ada has 0 apples."]
    assert run(["predict", str(texts), *flags]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prediction"]["answer"] for row in rows] == [sample["texts"][0]["text"] for sample in found["samples"]]
    assert all(row.keys() == {"text", "id", "prediction"} for row in rows)
    assert run(["eval", str(texts), "--model", str(model_folder), "--answer-after", "B:"]) == 1
    assert "row 1: its text has no 'B:'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count"), [("train", 100), ("test", 30)])
def test_wikisql_rows_are_questions_to_sql(name, count):
    """Table, columns and question are the prompt; the SQL behind the last "A:" is trained."""
    rows = [*answered(read_rows(WIKISQL / f"{name}.jsonl"), "A:")]
    tokenizer = tiny_lm.tokenizer()
    items = build(rows, tokenizer, max_length=2000).items
    assert len(items) == count
    for asked in prompts_of(items, tokenizer):
        assert asked.text.endswith("\nA:")
        assert all(answer.startswith("SELECT ") for answer in asked.references)
