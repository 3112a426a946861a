"""Runs with kinds of update and settings that ask something of the loop: LoRA+, LoRA-FA, AdaLoRA."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pictures
import torch
import yaml
from safetensors.torch import load_file
from test_processes import train_in_processes

import lorakit as lk
from lorakit.errors import ConfigError, LorakitError
from lorakit.layers.updates.adalora import AdaLoraFactors
from lorakit.train import resume
from lorakit.train.early_stop import EarlyStop
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

QUIET = Progress(quiet=True)
ADALORA = {"variant": "adalora", "adalora_rank": 2, "adalora_final": 0.3}
RUNS = {
    "LoRA+": {"lora_plus": 8.0, "dropout": 0.1},
    "LoRA+ of LoHa with Lion": {"lora_plus": 8.0, "variant": "loha", "optimizer": "lion", "learning_rate": 1e-3},
    "LoRA-FA": {"freeze_a": True},
    "AdaLoRA": ADALORA | {"dropout": 0.1},
    "AdaLoRA with Muon": ADALORA | {"optimizer": "muon", "adalora_every": 2},
}


def files_of(folder: RunFolder) -> dict[str, bytes]:
    """What a run leaves that does not depend on the clock."""
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in folder.path.rglob("*.safetensors")}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_killed_run_ends_with_the_same_bits(make_config, tmp_path, settings):
    """Killed in the middle: of the reduction of ranks, for AdaLoRA. With accumulation, and validation."""
    config = make_config(out=tmp_path / "whole", batch_size=6, steps=8, save_every=2, keep=9, eval_every=4, **settings)
    train(config, QUIET)
    whole = RunFolder(config.out)
    resumed = RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    for step in (6, 8):
        shutil.rmtree(resumed.checkpoints / f"step-{step}")
    shutil.rmtree(resumed.adapter)
    train(config.replace(out=str(resumed.path)), QUIET)
    assert files_of(resumed) == files_of(whole)
    for one, other in zip(resumed.rows(), whole.rows(), strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_adalora_killed_with_sigkill_inside_its_writes_ends_with_the_same_bits(make_config, tmp_path):
    config = make_config(out=tmp_path / "run", steps=8, save_every=2, eval_every=4, sample_tokens=0, **ADALORA)
    whole = config.replace(out=str(tmp_path / "whole"))
    train(whole, QUIET)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run([sys.executable, script, file, "file", "5", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ends"] == [-signal.SIGKILL] * len(told["kills"]) + [0], done.stderr
    assert len(told["kills"]) >= 3
    assert files_of(RunFolder(config.out)) == files_of(RunFolder(whole.out))


def test_lora_plus_logs_both_rates_and_trains_b_faster(make_config):
    config = make_config(lora_plus=8.0, steps=2, validation=0, warmup=0.0, schedule="constant")
    train(config, QUIET)
    rows = [row for row in RunFolder(config.out).rows() if "loss" in row]
    assert all(row["learning_rate_B"] == pytest.approx(8 * row["learning_rate"]) for row in rows)
    checkpoint = RunFolder(config.out).checkpoints / "step-2"
    first = {n: p.detach() for n, p in resume.trainable(set_up(config.replace(out=config.out + "-2")).model).items()}
    changes = {n: float((t - first[n]).abs().max()) for n, t in load_file(checkpoint / "trainable.safetensors").items()}
    largest = {half: max(change for name, change in changes.items() if name.endswith(half)) for half in "AB"}
    # AdamW's first steps are as large as the rate; A's first gradient is zero.
    assert largest["B"] == pytest.approx(2 * 8 * 5e-3, rel=0.01)
    assert 0 < largest["A"] <= 2 * 5e-3


def test_lora_fa_trains_b_alone_and_keeps_no_state_of_a(make_config):
    config = make_config(freeze_a=True, steps=4)
    result = train(config, QUIET)
    checkpoint = RunFolder(config.out).checkpoints / "step-4"
    for file in ("trainable", "optimizer"):
        names = load_file(checkpoint / f"{file}.safetensors")
        assert names
        assert all(".lora_default.B" in name for name in names)
    rows = [row["loss"] for row in RunFolder(config.out).rows() if "loss" in row]
    assert rows[-1] < rows[0]
    assert lk.Adapter.load(result.adapter).rank == 4


def test_adalora_logs_its_penalty_and_ends_with_its_budget(make_config):
    config = make_config(steps=8, patience=0, keep_best=False, **ADALORA)
    result = train(config, QUIET)
    rows = [row for row in RunFolder(config.out).rows() if "loss" in row]
    assert rows[0]["penalty"] > rows[-1]["penalty"] > 0
    adapter = lk.Adapter.load(result.adapter)
    ranks = [f.rank for f in adapter.factors.values()]
    assert len(ranks) == 14
    assert sum(rank for rank in ranks if rank > 1) <= 28 <= sum(ranks) + len(ranks)
    state = load_file(RunFolder(config.out).checkpoints / "step-8" / "buffers.safetensors")
    assert sum(int(t.sum()) for name, t in state.items() if name.endswith(".kept")) == 28
    assert json.loads((result.adapter / "lorakit.json").read_text())["recipe"]["variant"] == "adalora"


def test_the_best_held_out_loss_decides_which_ranks_the_result_has(make_config, monkeypatch):
    """Here it is best at the first evaluation, before ranks are cut."""
    real = EarlyStop.better
    monkeypatch.setattr(EarlyStop, "better", lambda self, loss, step: real(self, loss + step, step))
    config = make_config(steps=8, eval_every=2, patience=9, **ADALORA)
    result = train(config.replace(adalora_warmup=0.5), QUIET)
    assert result.best_step == 2
    assert {f.rank for f in lk.Adapter.load(result.adapter).factors.values()} == {4}


def test_a_sweep_over_them_trains_each_as_alone(make_config, tmp_path):
    run = make_config(sample_tokens=0, steps=3, validation=0, patience=0, eval_every=3)
    for changes in ({"variant": ["lora", "adalora"]}, {"lora_plus": [None, 8.0]}, {"freeze_a": [False, True]}):
        axis = next(iter(changes))
        plan = expand(run.model_dump() | {"out": str(tmp_path / axis)} | changes)
        sweep(plan, SweepProgress(quiet=True))
        for i, config in enumerate(plan.runs.values()):
            alone = config.replace(out=str(tmp_path / f"alone-{axis}-{i}"))
            train(alone, QUIET)
            ours, theirs = (
                load_file(RunFolder(c.out).checkpoints / "step-3" / "trainable.safetensors") for c in (config, alone)
            )
            assert ours.keys() == theirs.keys()
            off = torch.cat([(ours[n] - theirs[n]).flatten() for n in theirs]).abs()
            assert (off > 1e-4).float().mean() < 0.01, config.out
            for one, other in zip(RunFolder(config.out).rows(), RunFolder(alone.out).rows(), strict=True):
                assert one.keys() == other.keys()
                assert one.get("penalty", 0.0) == pytest.approx(other.get("penalty", 0.0), rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"lora_plus": 8.0}, {"freeze_a": True}, {"lora_plus": 4.0, "optimizer": "sgd"}], ids=str
)
def test_a_run_that_starts_from_an_adapter_may_have_them(make_config, tmp_path, settings):
    first = train(make_config(steps=2, out=tmp_path / "first"), QUIET)
    config = make_config(adapter=str(first.adapter), steps=2, **settings).replace()
    result = train(config, QUIET)
    before, after = (lk.Adapter.load(path) for path in (first.adapter, result.adapter))
    module = next(iter(before.factors))
    assert torch.equal(before.factors[module].A, after.factors[module].A) == settings.get("freeze_a", False)
    assert not torch.equal(before.factors[module].B, after.factors[module].B)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (ADALORA | {"ema": 0.9}, ConfigError, "ema: averages of AdaLoraFactors"),
        ({"lora_plus": 8.0, "targets": ["embed_tokens"]}, ConfigError, "lora_plus has no effect"),
        ({"freeze_a": True, "variant": "loha"}, LorakitError, "without a factor A"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_the_first_step(make_config, settings, error, message):
    config = make_config(**settings)
    with pytest.raises(error, match=message):
        train(config, QUIET)
    assert not RunFolder(config.out).metrics.exists()


def test_pictures_train_with_adalora_and_lora_plus_and_resume(tmp_path):
    model = tiny_pictures.save_pipeline(tmp_path / "sd1")
    pictures = tiny_pictures.write_pictures(tmp_path / "pictures", 4)
    config = tiny_pictures.config(
        model, pictures, tmp_path / "whole" / "run", save_every=2, keep=9, sample_steps=0, lora_plus=4.0, **ADALORA
    )
    train(config, QUIET)
    whole, resumed = RunFolder(config.out), RunFolder(tmp_path / "resumed" / "run")
    assert any(isinstance(m, AdaLoraFactors) for m in set_up(config.replace(out=str(tmp_path / "x"))).model.modules())
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-4")
    train(config.replace(out=str(resumed.path)), QUIET)
    assert files_of(resumed) == files_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ADALORA, ADALORA | {"optimizer": "muon", "lora_plus": 4.0}])
def test_two_processes_train_as_one(make_config, tmp_path, settings):
    """A row of the last batch of a pass is for one process alone; the penalty is added in both."""
    config = make_config(batch_size=6, micro_batch=2, steps=6, eval_every=3, save_every=6, sample_tokens=0, **settings)
    train(config, QUIET)
    both = config.replace(out=str(tmp_path / "both"))
    train_in_processes(both, tmp_path, 2)
    one, two = RunFolder(config.out), RunFolder(both.out)
    for ours, theirs in zip(two.rows(), one.rows(), strict=True):
        for key in theirs.keys() - {"seconds"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-3), key
    a, b = (load_file(f.checkpoints / "step-6" / "buffers.safetensors") for f in (one, two))
    kept = [(a[name] == b[name]).float().mean() for name in a if name.endswith(".kept")]
    assert float(torch.stack(kept).mean()) > 0.95
