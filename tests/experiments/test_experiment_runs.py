"""Tables of the paper's experiments in a step or two: they continue where they stopped, and are redrawn from JSON."""

from __future__ import annotations

import json

import pytest

from lorakit.cli import run as cli
from lorakit.errors import ConfigError
from lorakit.experiments import e2e, memory, runs
from lorakit.experiments.suite import Budget
from lorakit.experiments.work import CELLS, Work, start_over


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a small table of methods: full fine-tuning, LoRA, and BitFit, which the base has no biases for."""
    out = tmp_path_factory.mktemp("reproduce")
    few = {name: e2e.METHODS[name] for name in (e2e.FULL, e2e.REFERENCE, "BitFit")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(e2e, "METHODS", few)
        patch.setattr(e2e, "TRIES", (1, 3))
        patch.setattr(runs, "HELD_OUT", 4)
        patch.setattr(runs, "TRAIN", 16)
        call = ["reproduce", "e2e", "--seeds", "2", "--steps", "1", "--rows", "2", "--out", str(out)]
        assert cli(call) == 0
        yield out, call


def test_a_table_is_stored_with_its_command_time_and_machine(measured):
    out, _ = measured
    content = json.loads((out / "e2e.json").read_text())
    assert content["command"] == "lorakit reproduce e2e --seeds 2 --steps 1 --rows 2"
    assert content["seconds"] > 0
    assert content["machine"]["torch"]
    full, lora, bitfit = content["result"]["rows"]
    assert (full["trainable"], lora["trainable"]) == (5_868_800, 6 * 2 * 4 * (256 + 256))
    assert len(lora["losses"]) == len(lora["scores"]) == 2
    assert [rate for rate, _ in lora["tuned"]["tried"]] == [e2e.AUTO, 3 * e2e.AUTO]
    assert bitfit["reason"]
    assert 0 <= lora["scores"][0]["bleu"] <= 100
    page = (out / "experiments.md").read_text()
    assert "| BitFit | " in page.replace("not trained", "")
    assert (out / "e2e.png").read_bytes().startswith(b"\x89PNG")
    assert not list((out / "e2e").rglob("checkpoints"))


def test_a_finished_table_is_not_measured_again(measured, monkeypatch, capsys):
    out, call = measured
    before = (out / "e2e" / CELLS).read_bytes()
    monkeypatch.setattr("lorakit.experiments.runs._train", lambda *args: pytest.fail("trained again"))
    assert cli(call) == 0
    assert (out / "e2e" / CELLS).read_bytes() == before
    (out / "e2e.md").unlink()
    assert cli(["reproduce", "--table-only", "--out", str(out)]) == 0  # those that are there
    assert (out / "e2e.md").exists()


def test_another_budget_is_refused_and_leaves_the_table(measured, capsys):
    out, call = measured
    before = (out / "e2e" / CELLS).read_bytes()
    assert cli(["2" if word == "1" else word for word in call]) == 2
    assert "steps: 1 there, 2 now" in capsys.readouterr().err
    assert (out / "e2e" / CELLS).read_bytes() == before


def test_a_killed_part_is_computed_again_and_a_finished_one_is_not(tmp_path):
    def killed():
        raise KeyboardInterrupt

    work = Work(tmp_path / "t", Budget(steps=1), lambda line: None)
    assert work.cell("a", lambda: [1], {}) == [1]
    with pytest.raises(KeyboardInterrupt):
        work.cell("b", killed, {})
    again = Work(tmp_path / "t", Budget(steps=1), lambda line: None)
    assert again.cell("a", killed, {}) == [1]
    assert again.cell("b", lambda: 2, {}) == 2
    assert again.seconds == pytest.approx(again.seconds_of("a") + again.seconds_of("b"))


def test_a_part_that_was_stored_with_other_settings_is_measured_again(tmp_path):
    said: list[str] = []
    work = Work(tmp_path / "t", Budget(steps=1), said.append)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1")
    settings = {"rates": [1e-3, 2e-3], "data": str(rows)}
    work.cell("tuning", lambda: "first", settings)
    again = Work(tmp_path / "t", Budget(steps=1), said.append)
    assert again.cell("tuning", lambda: "second", {**settings, "rates": [1e-3, 2e-3]}) == "first"
    assert again.cell("tuning", lambda: "second", {**settings, "rates": [2e-3, 4e-3]}) == "second"
    assert any("other settings" in line for line in said)
    rows.write_text("2")
    assert again.cell("tuning", lambda: "third", {**settings, "rates": [2e-3, 4e-3]}) == "third"
    moved = tmp_path / "elsewhere.jsonl"
    rows.rename(moved)
    own = {**settings, "rates": [2e-3, 4e-3], "data": str(moved)}
    assert again.cell("tuning", lambda: "fourth", own) == "third"


def test_learning_rates_are_chosen_on_rows_that_are_neither_compared_nor_trained_on(tmp_path):
    files = runs.e2e_files(tmp_path)
    held_out, train = ((tmp_path / files[name]).read_text().splitlines() for name in ("validation", "data"))
    tuning = runs.tuning_rows(tmp_path).read_text().splitlines()
    assert len(tuning) == len(held_out) == runs.HELD_OUT
    assert len(train) == runs.TRAIN
    assert not set(tuning) & {*held_out, *train}


def test_a_damaged_or_foreign_folder_is_named(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / CELLS).write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        Work(folder, Budget())
    start_over(folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no table"):
        start_over(folder)
    assert (folder / "letter.txt").exists()


def test_wrong_calls_are_refused_before_anything_runs(tmp_path, capsys):
    out = ["--out", str(tmp_path / "o")]
    assert cli(["reproduce", "gpt", *out]) == 2
    assert "did you mean 'gpt3'" in capsys.readouterr().err
    assert cli(["reproduce", "gpt3", "--seeds", "2", *out]) == 2
    assert "--seeds has no effect on gpt3" in capsys.readouterr().err
    assert cli(["reproduce", "ranks", "--file", "x", *out]) == 2
    assert "--file is for the table address" in capsys.readouterr().err
    assert cli(["reproduce", "ranks", "--table-only", *out]) == 2
    assert "measure it first" in capsys.readouterr().err
    assert cli(["reproduce", "--table-only", *out]) == 2
    assert "has no tables" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_list_has_every_table_with_its_budget(capsys):
    assert cli(["reproduce", "--list"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "ranks which rank" in printed
    assert "--seeds 3 --steps 40 --rows 35" in printed


def test_memory_is_predicted_as_it_is_measured():
    settings = memory.METHODS["LoRA, q and v, r 4"]
    predicted, measured = memory.predicted(settings), memory.measured(settings)
    trained = 6 * 2 * 4 * (256 + 256)
    assert predicted["trained"] == measured["trained"] == trained
    assert measured["gradients"] == 4 * trained
    sides = [[side[name] // (4 * trained) for name in memory.OPTIMIZERS] for side in (predicted, measured)]
    assert sides == [[0, 1, 1, 2], [0, 1, 1, 2]]
    assert predicted["weights"] == measured["weights"]
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)
