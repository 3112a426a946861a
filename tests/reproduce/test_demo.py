"""The demo in a few steps: it learns, evaluates, merges, resumes, and names the next command."""

from __future__ import annotations

import json

import pytest
import torch

import lorakit as lk
from lorakit.bases.load import load_model, load_tokenizer
from lorakit.cli import run as cli
from lorakit.data.dataset import build
from lorakit.data.read import read_rows
from lorakit.reproduce.demo import ASSETS, ROWS_FILE, run
from lorakit.tasks.text.perplexity import perplexity
from lorakit.train.run_folder import RunFolder

STEPS, ROWS = 3, 8


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, outcome, printed lines) after three steps."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    lines: list[str] = []
    outcome = run(out, rows=ROWS, steps=STEPS, say=lines.append)
    return out, outcome, lines


def test_the_demo_scores_base_and_adapter_and_merges(demo):
    out, outcome, lines = demo
    base, tuned = outcome.scores
    assert (base.name, tuned.name) == ("base", "LoRA")
    for score in (base, tuned):
        assert all(0 <= value <= 100 for value in (score.bleu, score.chrf, score.rouge_l, score.slot_errors))
    assert base.seconds == 0 < tuned.seconds < outcome.seconds
    assert (outcome.adapter, outcome.merged) == (str(out / "run" / "adapter"), str(out / "merged"))
    assert len(outcome.samples) == 3
    assert all(set(sample) == {"prompt", "base", "LoRA"} for sample in outcome.samples)
    assert [line[0] for line in lines] == ["1", "2", "3"]
    json.dumps(outcome.to_dict())


def test_merged_model_and_adapter_agree(demo):
    _, outcome, _ = demo
    assert 0 <= outcome.merged_difference < 1e-3
    assert load_model(outcome.merged, torch.float32, torch.device("cpu")).config.model_type == "llama"
    load_tokenizer(outcome.merged)


def test_a_few_steps_lower_the_loss_on_the_test_rows(demo):
    _, outcome, _ = demo
    model, tokenizer = load_model("embedded", torch.float32, torch.device("cpu")), load_tokenizer("embedded")
    items = build(read_rows(ASSETS / "test.jsonl", limit=16), tokenizer).items
    before = perplexity(model, items, 0).loss
    lk.attach(model, lk.Adapter.load(outcome.adapter))
    assert perplexity(model, items, 0).loss < before - 0.01


def test_a_second_run_resumes_and_gives_the_same_adapter(demo):
    out, outcome, _ = demo
    folder = RunFolder(out / "run")
    before = (folder.adapter / "adapter_model.safetensors").read_bytes(), folder.metrics.read_bytes()
    again = run(out, rows=2, steps=STEPS, say=lambda _: None)
    assert ((folder.adapter / "adapter_model.safetensors").read_bytes(), folder.metrics.read_bytes()) == before
    assert again.scores[1].seconds == outcome.scores[1].seconds


def test_a_demo_killed_before_its_training_run_starts_over(tmp_path):
    (tmp_path / ROWS_FILE).write_text("{}\n")
    assert cli(["demo", "--out", str(tmp_path), "--steps", "1", "--rows", "1", "--json"]) == 0


def test_other_steps_need_force_and_foreign_folders_are_never_replaced(demo, tmp_path, capsys):
    out, _, _ = demo
    assert cli(["demo", "--out", str(out), "--steps", "1", "--rows", "1"]) == 1
    assert "steps: was 3, is now 1" in capsys.readouterr().err
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "merged").mkdir()
    for force in ([], ["--force"]):
        assert cli(["demo", "--out", str(tmp_path), "--steps", "1", "--rows", "1", *force]) == 2
        assert "not empty and not a demo's folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "thesis.txt"]
    assert {p.name for p in out.iterdir()} == {ROWS_FILE, "run", "merged"}
    assert cli(["demo", "--out", str(out), "--steps", "1", "--rows", "1", "--force", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["adapter"] == str(out / "run" / "adapter")
    assert [row["step"] for row in RunFolder(out / "run").rows() if "loss" in row] == [1]
    assert cli(["demo", "--out", str(out), "--steps", "1", "--rows", "1"]) == 0
    *_, next_line, served, own_data = capsys.readouterr().out.splitlines()
    assert next_line.startswith("next: lorakit generate 'name[")
    assert f"--adapter {out}/run/adapter" in next_line
    assert served.strip().startswith(f"lorakit serve embedded --adapter demo={out}/run/adapter ")
    assert own_data.strip().startswith("lorakit train --data")
