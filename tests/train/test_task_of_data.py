"""A run without a task takes it from its first row; a task that is given, an earlier run and an adapter count first."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_lm

from lorakit.cli import run
from lorakit.data.parse import Row
from lorakit.errors import ConfigError
from lorakit.tasks import task_of_adapter
from lorakit.train import task_of_data
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_task import for_data
from lorakit.train.task_of_data import with_task
from lorakit.train.train import train

QUIET = Progress(quiet=True)
LABELLED = [{"text": f"{n} sees {w}", "label": w} for n in tiny_lm.NAMES for w in ("tea", "sand")]


@pytest.fixture
def labelled(tmp_path):
    return tiny_lm.write_rows(tmp_path / "labelled.jsonl", LABELLED)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "so", "label": "good"}, {}, "classification"),
        ({"text": "so", "label": 1}, {}, "classification"),
        ({"text": "so", "text_pair": "as", "label": 1, "id": 7}, {}, "classification"),
        ({"sentence": "so", "gold": 1}, {"text": "sentence", "label": "gold"}, "classification"),
        ({"text": "so", "label": "x"}, {"prompt": "text", "completion": "label"}, "causal_lm"),
        ({"text": "so"}, {}, "causal_lm"),
        ({"prompt": "so", "completion": "as"}, {}, "causal_lm"),
        ({"text": "so", "label": "x", "messages": []}, {}, "causal_lm"),
    ],
)
def test_the_task_is_that_of_the_first_rows_columns(row, columns, expected, tmp_path):
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", [row])
    config = TrainConfig(data=str(data), columns=columns, out=str(tmp_path / "run"))
    assert with_task(config).task == expected


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([5, 3.8, 1.25], "regression"),  # the first score of STS-B's is 5.000
        (["5", "3.800"], "regression"),
        ([1, 2, 0], "classification"),
        (["good", 3.8], "classification"),  # which says that 3.8 is no class
        ([0.0, 1.0], ["classification", "regression"]),  # as pandas writes 0 and 1 beside an empty cell
        (["0.0", "1.0", "2"], ["classification", "regression"]),
    ],
)
def test_labels_are_classes_or_measures_by_the_first_hundred_of_them(labels, expected, tmp_path):
    rows = [{"text": f"so {i}", "label": labels[i % len(labels)]} for i in range(12)]
    config = TrainConfig(data=str(tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)), out=str(tmp_path / "run"))
    if isinstance(expected, str):
        assert with_task(config).task == expected
        return
    with pytest.raises(ConfigError, match=r"several tasks: classification, regression\n.*--task regression \(predict"):
        with_task(config)


@pytest.mark.parametrize("label", [0, 1, "0", "True", "false", 1.0])
@pytest.mark.parametrize(
    "answer", [{"prompt": "so", "completion": "as"}, {"messages": [{"role": "user", "content": "so"}]}]
)
def test_a_label_that_may_call_an_answer_undesirable_needs_a_task(label, answer, tmp_path):
    """A language model would imitate the undesirable answers too."""
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", [answer | {"label": label}, answer | {"label": 1}])
    with pytest.raises(ConfigError, match=r"label\).*: causal_lm, preference\n(.|\n)*--task preference"):
        with_task(TrainConfig(data=str(data), out=str(tmp_path / "run")))
    other = tiny_lm.write_rows(tmp_path / "other.jsonl", [answer | {"label": label}, answer | {"label": "sports"}])
    assert with_task(TrainConfig(data=str(other), out=str(tmp_path / "run"))).task == "causal_lm"


def test_words_and_tags_of_different_numbers_are_that_tasks_error(model_folder, tmp_path, capsys):
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", [{"tokens": ["Ada", "sees"], "tags": ["B-PER"]}])
    assert run(["train", "--data", str(data), "--model", str(model_folder), "--out", str(tmp_path / "run")]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "row 1: 2 words, but 1 tags; expected one for each word" in said
    elsewhere = tiny_lm.write_rows(
        tmp_path / "text.jsonl", [{"text": "Ada sees", "tokens": ["Ada"], "tags": ["a", "b"]}]
    )
    assert with_task(TrainConfig(data=str(elsewhere), out=str(tmp_path / "run"))).task == "causal_lm"


def test_the_panel_gives_the_rows_as_the_reason_where_the_first_one_alone_tells_nothing():
    items = [SimpleNamespace(row=Row({"text": "so", "label": label}, "rows.jsonl", 1)) for label in (5, 3.8)]
    config = TrainConfig(data="rows.jsonl", task="regression")
    assert task_of_data.reason(config, items).endswith("(the rows have text, label)")
    assert task_of_data.reason(config, items[:1]).endswith("(as given)")


def test_a_sweep_has_the_task_of_its_data(labelled, tmp_path):
    values = {"data": str(labelled), "rank": [2, 4], "out": str(tmp_path / "sweep")}
    with pytest.raises(
        ConfigError, match=r"(?s)classification trains a head.*rows of .*labelled.jsonl; --task causal_lm"
    ):
        for_data(expand(values), values)
    given = values | {"task": "causal_lm"}
    plan = expand(given)
    assert for_data(plan, given) is plan

    pairs = str(tiny_lm.write_rows(tmp_path / "pairs.jsonl", [{"prompt": "so", "chosen": "as", "rejected": "at"}]))
    values = {"data": pairs, "rank": [2, 4], "out": str(tmp_path / "sweep")}
    plan = for_data(expand(values), values)
    assert {config.task for config in plan.runs.values()} == {"preference"}
    assert plan.settings["task"] == "preference"
    text = str(tiny_lm.write_rows(tmp_path / "text.jsonl", [{"text": "so"}]))
    plain = values | {"data": text}
    assert {config.task for config in for_data(expand(plain), plain).runs.values()} == {"causal_lm"}
    both = values | {"data": [pairs, text]}
    with pytest.raises(ConfigError, match=r"pairs.jsonl has rows for the task preference, .*text.jsonl for causal_lm"):
        for_data(expand(both), both)


def test_the_command_sweep_does_not_train_a_language_model_on_labelled_rows(labelled, model_folder, tmp_path, capsys):
    flags = ["--data", str(labelled), "--model", str(model_folder), "--out", str(tmp_path / "sweep"), "--rank", "2,4"]
    assert run(["sweep", *flags]) == 2
    assert "task: classification trains a head" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "sweep").exists()


def test_a_task_that_is_given_counts(labelled, tmp_path):
    config = TrainConfig(data=str(labelled), task="causal_lm", out=str(tmp_path / "run"))
    assert with_task(config) is config


def test_two_tasks_that_recognize_a_row_are_named(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(task_of_data, "recognizing", lambda row, rows: ["classification", "regression"])
    with pytest.raises(ConfigError, match=r"row 1: its columns \(text, label\).*classification, regression\n.*--task"):
        with_task(TrainConfig(data=str(labelled), out=str(tmp_path / "run")))


def test_a_run_that_began_without_this_is_resumed_as_it_was(labelled, make_config):
    """Its rows of text and label were plain text for a language model."""
    config = make_config(data=labelled, task="causal_lm", steps=2, sample_tokens=0)
    train(config, QUIET)
    again = TrainConfig(**{n: getattr(config, n) for n in config.model_fields_set - {"task"}} | {"steps": 3})
    assert with_task(again).task == "causal_lm"
    assert train(again, QUIET).step == 3


def test_the_start_panel_says_which_task_and_why_and_the_adapter_records_it(
    labelled, model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--data", str(labelled), "--model", str(model_folder), "--out", str(tmp_path / "run"), *tiny_lm.FLAGS[:-2]]
    flags += ["--learning-rate", "1e-3"]
    assert run(["train", *flags]) == 0
    told = capsys.readouterr().out
    assert "classification: predict a label for a text or a pair of texts (the rows have text, label)" in told
    assert "--task classification" in told.splitlines()[-1]
    metadata = json.loads((RunFolder(tmp_path / "run").adapter / "lorakit.json").read_text())
    assert metadata["recipe"]["task"] == "classification"
    assert run(["train", *flags]) == 0  # resumes


def test_the_task_of_an_adapter_is_its_recipes_or_else_of_its_type():
    assert task_of_adapter("SEQ_CLS", {}) == "classification"
    assert task_of_adapter("SEQ_CLS", {"recipe": {"task": "classification"}}) == "classification"
    assert task_of_adapter("CAUSAL_LM", {"recipe": {"rank": 4}}) == "causal_lm"
    assert task_of_adapter("SEQ_CLS", {"recipe": {"rank": 4}}) == "classification"  # a default that does not fit
    assert task_of_adapter("SEQ_CLS", {"recipe": {"task": "of_another_version"}}) == "classification"
    assert task_of_adapter(None, {}) is None
