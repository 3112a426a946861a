"""Preferences on the command line: the task is told by the columns; show, plan, train, go on, evaluate, predict."""

from __future__ import annotations

import json

import pytest
import tiny_lm


def pair(row):
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no apples."}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_lm.write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", map(pair, tiny_lm.rows()))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    made = [row | {"label": i % 2 == 0} for i, row in enumerate(tiny_lm.rows())]
    return tiny_lm.write_rows(tmp_path_factory.mktemp("labelled") / "labelled.jsonl", made)


def test_data_show_marks_both_answers(lorakit, model, rows):
    code, out, error = lorakit("data", "show", rows, "--model", model, "--rows", "1")
    assert code == 0, error
    first = pair(tiny_lm.rows()[0])
    for name in ("chosen", "rejected"):
        assert f"{name} ({len(first['prompt'] + first[name]) + 1} tokens, {len(first[name]) + 1} trained)\n" in out
        assert f"{first['prompt']}⟦{first[name]}</s>⟧" in out
    assert "24 of 24 have the longer answer chosen" in out
    assert out.splitlines()[-1] == f"next: lorakit train --data {rows} --model {model}"
    code, out, _ = lorakit("data", "show", rows, "--model", model, "--json")
    assert (json.loads(out)["rows"], json.loads(out)["shape"]) == (24, "chosen, rejected (prompt/completion)")
    code, _, error = lorakit("data", "show", rows, "--model", model, "--train-on", "all")
    assert code == 2
    assert "--train-on" in error


def test_data_show_of_answers_with_a_label(lorakit, model, labelled):
    code, out, _ = lorakit("data", "show", labelled, "--model", model, "--rows", "2")
    assert code == 0
    assert "\ndesirable (" in out
    assert "\nundesirable (" in out
    assert "12 desirable, 12 undesirable" in out


def test_a_run_is_planned(lorakit, model):
    given = ("--model", model, "--rank", "4", "--max-length", "64", "--memory", "4GB", "--precision", "fp32", "--json")
    code, out, error = lorakit("plan", "--task", "preference", *given)
    assert code == 0, error
    pairs = json.loads(out)["estimates"]
    code, out, _ = lorakit("plan", *given)
    single = json.loads(out)["estimates"]
    assert code == 0
    own, other = (next(e for e in each if e["method"] == "lora") for each in (pairs, single))
    assert own["parts"]["activations"] > 1.5 * other["parts"]["activations"]  # two answers a row


def test_a_run_goes_on_from_supervised_training_and_is_evaluated(lorakit, model, rows, trained, tmp_path):
    out = tmp_path / "run"
    given = ["--model", model, "--data", rows, "--out", out, *tiny_lm.FLAGS[2:]]
    code, _, error = lorakit("train", *given, "--adapter", trained / "adapter")
    assert code == 1
    assert "--task preference" in error  # without it, the adapter's own task counts
    code, printed, error = lorakit("train", *given, "--adapter", trained / "adapter", "--task", "preference")
    assert code == 0, error
    assert f"next: lorakit eval TEST.jsonl --model {model} --adapter {out}/adapter" in printed
    assert "--task preference" in printed
    code, _, error = lorakit("train", *given, "--adapter", out / "adapter", "--loss", "ipo")
    assert code == 2
    assert "remove it, or give --task preference" in error
    for more in ([], ["--beta", "0.5", "--loss", "ipo", "--task", "preference"]):  # another loss is no contradiction
        second = [*given[:4], "--out", tmp_path / f"second{len(more)}", *given[6:]]
        code, _, error = lorakit("train", *second, "--adapter", out / "adapter", "--quiet", *more)
        assert code == 0, error
    code, printed, error = lorakit("eval", rows, "--model", model, "--adapter", out / "adapter", "--json")
    assert code == 0, error
    told = json.loads(printed)
    assert told["task"] == "preference"
    (measured,) = told["results"]
    assert {"loss", "reward_accuracy", "reward_margin", "likelihood_accuracy", "rows"} <= measured.keys()
    code, printed, _ = lorakit("eval", rows, "--model", model, "--adapter", out / "adapter")
    assert "reward accuracy" in printed
    assert "chosen likelier" in printed


def test_the_task_is_told_by_the_columns(lorakit, model, rows, labelled, tmp_path):
    for data, loss in ((rows, "dpo, beta 0.1"), (labelled, "kto, beta 0.1")):
        code, printed, error = lorakit(
            "train", "--model", model, "--data", data, "--out", tmp_path / loss[:3], *tiny_lm.FLAGS, "--steps", "1"
        )
        assert code == 0, error
        assert "preference: learn which of two answers is better" in printed
        assert loss in printed


def test_prompts_are_answered(lorakit, model, rows, trained, tmp_path):
    out = tmp_path / "answers.jsonl"
    given = ["--model", model, "--adapter", trained / "adapter", "--task", "preference", "--max-new-tokens", "4"]
    code, _, error = lorakit("predict", rows, *given, "--out", out)
    assert code == 0, error
    assert len(out.read_text().splitlines()) == 24


def test_a_card_names_the_loss(lorakit, model, rows, tmp_path):
    out = tmp_path / "run"
    given = ["--task", "preference", "--loss", "simpo", "--beta", "1.5", "--quiet"]
    assert lorakit("train", "--model", model, "--data", rows, "--out", out, *tiny_lm.FLAGS, *given)[0] == 0
    code, _, error = lorakit("card", out)
    assert code == 0, error
    card = (out / "adapter" / "README.md").read_text()
    for line in ("| loss | simpo |", "| beta | 1.5 |", "| simpo_gamma | 1.0 |"):
        assert line in card.replace("simpo gamma", "simpo_gamma")
    assert "| reward accuracy |" in card
