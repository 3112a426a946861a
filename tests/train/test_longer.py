"""A run that ended, or was stopped, goes on with more epochs in its own folder; a shorter one is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from lorakit.errors import TrainError
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture
def ended(make_config):
    """The config of a run that ended after one epoch (5 steps of 4 rows)."""
    config = make_config(steps=None, epochs=1, eval_every=5, patience=0, keep=9, dropout=0.1)
    assert train(config, QUIET).step == 5
    return config


def test_more_epochs_resume_with_the_optimizer_on_the_longer_schedule(ended):
    before = RunFolder(ended.out).rows()
    result = train(ended.replace(epochs=3), QUIET)
    rows = [row for row in RunFolder(ended.out).rows() if "loss" in row]
    assert (result.step, result.steps, result.stopped) == (15, 15, None)
    assert RunFolder(ended.out).rows()[: len(before)] == before
    assert [row["step"] for row in rows] == list(range(1, 16))
    # linear from the end of the warm-up (one step) to the end of the longer run
    assert rows[5]["learning_rate"] == pytest.approx(ended.learning_rate * (1 - 4 / 14))
    record = json.loads((result.adapter / "lorakit.json").read_text())
    assert record["lengthened"] == [{"at": 5, "steps": 5}]
    assert yaml.safe_load(RunFolder(ended.out).config.read_text())["epochs"] == 3


def test_the_longer_run_killed_ends_with_the_same_bits(ended, tmp_path):
    other = RunFolder(tmp_path / "other")
    shutil.copytree(ended.out, other.path)
    longer = ended.replace(epochs=3)
    train(longer, QUIET)
    train(longer.replace(out=str(other.path)), QUIET)
    for step in (10, 15):
        shutil.rmtree(other.checkpoints / f"step-{step}")
        train(longer.replace(out=str(other.path)), QUIET)
    for file in ("adapter_model.safetensors", "lorakit.json"):
        assert (other.adapter / file).read_bytes() == (RunFolder(ended.out).adapter / file).read_bytes()


def test_it_can_be_made_longer_again_and_in_steps(ended):
    train(ended.replace(epochs=2), QUIET)
    result = train(ended.replace(epochs=2, steps=12), QUIET)
    assert result.step == 12
    record = json.loads((result.adapter / "lorakit.json").read_text())
    assert record["lengthened"] == [{"at": 5, "steps": 5}, {"at": 10, "steps": 10}]


def test_a_shorter_run_is_refused_and_nothing_changes(ended):
    train(ended.replace(epochs=3), QUIET)
    files = {p: p.read_bytes() for p in RunFolder(ended.out).path.rglob("*") if p.is_file()}
    with pytest.raises(TrainError, match=r"epochs: was 3\.0, is now 1\.0\n.*planned for 15 steps, and this is 5"):
        train(ended, QUIET)
    with pytest.raises(TrainError, match="rank: was 4, is now 3") as error:
        train(ended.replace(epochs=4, rank=3), QUIET)
    assert "longer, not shorter" not in str(error.value)
    assert files == {p: p.read_bytes() for p in RunFolder(ended.out).path.rglob("*") if p.is_file()}


def test_a_run_that_stopped_early_needs_more_patience_too(make_config):
    config = make_config(
        steps=12, eval_every=1, learning_rate=0.9, schedule="constant", patience=1, diverged="continue"
    )
    first = train(config, QUIET)
    assert first.stopped == "early"
    with pytest.raises(TrainError, match=r"it stopped early at step .*\n?.*raise patience above 1 too"):
        train(config.replace(steps=14), QUIET)
    assert yaml.safe_load(RunFolder(config.out).config.read_text())["steps"] == 12
    result = train(config.replace(steps=14, patience=0), QUIET)
    assert (result.step, result.stopped) == (14, None)
    with pytest.raises(TrainError, match="patience can be raised"):
        train(config.replace(steps=14), QUIET)
