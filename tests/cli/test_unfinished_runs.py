"""A checkpoint, and a run that has not ended, are adapters for every verb that takes one."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import tiny_lm

import lorakit as lk
from lorakit.cli import run
from lorakit.train import loop

FLAGS = [*tiny_lm.FLAGS, "--save-every", "2", "--eval-every", "2"]


@pytest.fixture(scope="module")
def interrupted(model, data, tmp_path_factory):
    """The folder of a run that Ctrl-C stopped after its fourth step of six."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    real, steps = loop.Loop._step, []

    def stepped(self, active):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, active)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Loop, "_step", stepped)
        assert run(["train", "--model", model, "--data", data, "--out", str(out), "--quiet", *FLAGS]) == 130
    return out


@pytest.mark.parametrize("where", ["", "checkpoints/step-4", "checkpoints/step-2"])
def test_verbs_take_a_checkpoint_and_an_interrupted_run(lorakit, model, data, interrupted, tmp_path, where):
    source = interrupted / where
    calls = {
        "inspect": ["inspect", source, "--json"],
        "generate": ["generate", "a", "--model", model, "--adapter", source, "--max-new-tokens", "2"],
        "eval": ["eval", data, "--model", model, "--adapter", source, "--no-text"],
        "export": ["export", source, tmp_path / "out", "--for", "peft", "--verify"],
        "convert": ["convert", source, tmp_path / "mlx", "--to", "mlx"],
        "merge": ["merge", model, source, tmp_path / "merged"],
    }
    for verb, args in calls.items():
        code, _, err = lorakit(*args)
        assert code == 0, (verb, err)
        assert ("has not ended; using its newest checkpoint, step-4" in err) == (where == ""), verb
    metrics = lk.Adapter.load(source).metadata["metrics"]
    step = 2 if where.endswith("2") else 4
    logged = {}
    for line in (interrupted / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        logged |= row if row["step"] == step else {}
    assert (metrics["step"], round(metrics["loss"], 5)) == (step, logged["loss"])
    assert round(metrics["held_out_loss"], 5) == logged["held_out_loss"]


def test_peft_loads_a_checkpoint(model, interrupted):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(base, interrupted / "checkpoints" / "step-4")
    assert loaded.peft_config["default"].r == 4


def test_an_interrupted_run_has_a_report(interrupted):
    assert "<svg" in (interrupted / "report.html").read_text()


def test_the_result_has_the_metrics_of_the_step_whose_parameters_it_has(lorakit, model, data, interrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    code, _, err = lorakit("train", "--model", model, "--data", data, "--out", folder, "--quiet", *FLAGS)
    assert code == 0, err
    metrics = lk.Adapter.load(folder).metadata["metrics"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    best = min(held_out, key=held_out.get)
    assert (metrics["step"], metrics["steps"]) == (best, 6)
    assert round(metrics["held_out_loss"], 5) == held_out[best]
    assert round(metrics["loss"], 5) == next(row["loss"] for row in rows if row["step"] == best and "loss" in row)
