"""`lorakit eval` and `predict` of tasks with measures of their own: the run's rows, every row said, no flag in vain."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_lm
import torch

from lorakit.cli.predict import _columns
from lorakit.cli.shared.json_text import json_text

STEP = [*tiny_lm.FLAGS[:-2], "--steps", "1", "--diverged", "continue", "--quiet"]


def made(lorakit, *flags):
    code, printed, error = lorakit(*flags)
    assert code == 0, error
    return printed


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A model, and the flags that use a classifier on it."""
    from lorakit.cli import run

    folder = tmp_path_factory.mktemp("classified")
    model = tiny_lm.save(folder / "model")
    rows = [{"text": name, "label": "xy"[i % 2]} for i, name in enumerate(tiny_lm.NAMES)]
    data = tiny_lm.write_rows(folder / "rows.jsonl", rows)
    assert run(["train", "--model", str(model), "--data", str(data), "--out", str(folder / "run"), *STEP]) == 0
    return data, ["--model", model, "--adapter", folder / "run" / "adapter"]


def test_preferences_are_judged_with_the_chat_template_of_the_run(lorakit, tmp_path):
    """The base has none: without the adapter's, its rows could not be rendered."""
    model, template = tiny_lm.save(tmp_path / "model"), tmp_path / "chat.jinja"
    template.write_text(tiny_lm.CHATML)
    said = [
        {"prompt": [{"role": "user", "content": f"{n}?"}]}
        | {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", f"{n}!"), ("rejected", "no"))}
        for n in tiny_lm.NAMES
    ]
    data, test = (tiny_lm.write_rows(tmp_path / f"{i}.jsonl", said[i::2]) for i in range(2))
    flags = ["--model", model, "--data", data, "--validation", test, "--chat-template", template, "--learning-rate"]
    made(lorakit, "train", *flags, "0.01", "--out", tmp_path / "run", *STEP[:-1], "--precision", "fp32")
    rows = lines((tmp_path / "run" / "metrics.jsonl").read_text())
    use = ["--model", model, "--adapter", tmp_path / "run" / "adapter", "--precision", "fp32", "--json"]
    (found,) = json.loads(made(lorakit, "eval", test, *use))["results"]
    assert found["loss"] == pytest.approx(rows[-1]["held_out_loss"], rel=1e-4) != pytest.approx(0.6931, abs=1e-4)
    other = tmp_path / "other.jinja"
    other.write_text(tiny_lm.CHATML.replace("<", "[["))
    (changed,) = json.loads(made(lorakit, "eval", test, *use, "--chat-template", other))["results"]
    assert changed["loss"] != found["loss"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-new-tokens", "5"],
        ["--no-text"],
        ["--text"],
        ["--samples", "2"],
        ["--template", "plain"],
        ["--turns", "last"],
        ["--answer-after", "A:"],
        ["--chat-template", "chat.jinja"],
        ["--chat-template-kwargs", "a=b"],
        ["--date", "2024-05-06"],
        ["--answer", "x"],
        ["--normalize"],
    ],
)
def test_flags_without_an_effect_are_refused_by_name(lorakit, classified, flags):
    data, use = classified
    code, _, error = lorakit("eval", data, *use, *flags)
    assert code != 0
    assert f"{flags[0]}: " in error
    assert f"remove {flags[0]}" in error


def test_rows_that_are_cut_or_left_out_are_said(lorakit, classified, tmp_path):
    _, use = classified
    rows = [
        {"text": "a" * 3, "label": "x"},
        {"text": "b" * 200, "label": "y"},
        {"text": "c", "label": "x", "weight": 0},
    ]
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
    found = json.loads(made(lorakit, "eval", data, *use, "--json"))
    cut, left_out = found["notes"]
    assert f"at most {tiny_lm.POSITIONS} tokens (positions of the model), 1 cut" in cut
    assert left_out.startswith("note: 1 rows: ")
    assert found["results"][0]["rows"] == 2
    printed = made(lorakit, "eval", data, *use, "--limit", 1)
    assert f"{cut} (of all rows, beyond --limit too)" in printed
    code, printed, error = lorakit("predict", data, *use)
    assert (code, len(lines(printed))) == (0, 3)
    assert f"1 of 3 rows are longer than the model's positions and were cut; the first is {data}, row 2" in error


def test_a_limit_is_of_questions_with_all_their_windows(lorakit, tmp_path):
    """The answer is in the last of several windows: the first one alone cannot be right."""
    model = tiny_lm.save(tmp_path / "model")
    long = " ".join(["word"] * 60) + " Bo"
    rows = [
        {"question": "Who?", "context": text, "answers": {"text": ["Bo"], "answer_start": [text.index("Bo")]}}
        for text in (long, "Bo is", long)
    ]
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--model", model, "--data", data, "--window", "64", "--stride", "16", "--task", "question_answering"]
    made(lorakit, "train", *flags, "--out", tmp_path / "run", *STEP)
    use = ["--model", model, "--adapter", tmp_path / "run" / "adapter", "--json"]
    results = [json.loads(made(lorakit, "eval", data, *use, "--limit", n))["results"][0] for n in (1, 2)]
    assert [each["rows"] for each in results] == [1, 2]
    alone = tiny_lm.write_rows(tmp_path / "alone.jsonl", rows[:1])
    assert json.loads(made(lorakit, "eval", alone, *use))["results"][0] == results[0]


def test_numbers_that_are_not_finite(lorakit, tmp_path):
    """A correlation of one row is none; a model's prediction that is no number names its row."""
    base = tiny_lm.llama()
    with torch.no_grad():
        base.get_input_embeddings().weight[tiny_lm.tokenizer().encode("z")[0]] = torch.nan
    model = tiny_lm.save(tmp_path / "model", base)
    rows = [{"text": name, "label": i + 0.5} for i, name in enumerate(tiny_lm.NAMES) if "z" not in name]
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--model", model, "--data", data, "--task", "regression", "--out", tmp_path / "run"]
    made(lorakit, "train", *flags, *STEP)
    use = ["--model", model, "--adapter", tmp_path / "run" / "adapter"]
    one = tiny_lm.write_rows(tmp_path / "one.jsonl", rows[:1])
    printed = made(lorakit, "eval", one, *use, "--json")
    assert "NaN" not in printed
    assert json.loads(printed)["results"][0]["pearson"] is None
    broken = tiny_lm.write_rows(tmp_path / "broken.jsonl", [{"text": "a"}, {"text": "z"}])
    code, printed, error = lorakit("predict", broken, *use)
    assert (code != 0, printed) == (True, "")
    assert f"{broken}, row 2: what the model predicts is not a finite number" in error
    assert json_text({"a": [1.5, float("inf")], "b": (float("nan"), "NaN")}) == '{"a": [1.5, null], "b": [null, "NaN"]}'


def test_stored_files_stay_out_of_predictions():
    values = {"audio": {"bytes": b"RIFF", "path": "a.wav"}, "images": [b"PNG", {"bytes": b"PNG"}], "raw": b"x", "id": 7}
    item = SimpleNamespace(row=SimpleNamespace(values=values))
    assert _columns(item) == {"audio": {"path": "a.wav"}, "images": [{}], "id": 7}
    assert values["raw"] == b"x"  # the row itself stays


def test_a_fully_fine_tuned_model_is_not_judged_against_itself(lorakit, tmp_path):
    """Its loss would be 0.6931, of a model that learnt nothing; how often it prefers the chosen answer is known."""
    model = tiny_lm.save(tmp_path / "model")
    rows = [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "no"} for n in tiny_lm.NAMES]
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--model", model, "--data", data, "--method", "full", "--out", tmp_path / "run", *STEP[2:]]
    made(lorakit, "train", *flags)
    held_out = [row for row in lines((tmp_path / "run" / "metrics.jsonl").read_text()) if "held_out_loss" in row]
    assert all(row["held_out_loss"] > 0 for row in held_out)  # the run itself knows its reference
    use = [data, "--model", tmp_path / "run" / "model", "--task", "preference"]
    (found,) = json.loads(made(lorakit, "eval", *use, "--json"))["results"]
    assert found.keys() == {"adapter", "loss", "likelihood_accuracy", "rows"}
    assert found["loss"] is None
    assert "reward" not in made(lorakit, "eval", *use)
