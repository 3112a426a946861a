"""A run's learning rate by trial: which rates, which is taken, and that a resumed run does not look again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from lorakit.errors import ConfigError, TrainError
from lorakit.train import loop
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.sweep import find_lr
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture
def config(make_config):
    return make_config(learning_rate="auto", find_lr=True, steps=12, sample_tokens=0)


def test_the_rate_of_the_lowest_held_out_loss_is_trained_with_and_written(config):
    result = train(config, QUIET)
    assert result.step == 12
    told = json.loads((Path(config.out) / find_lr.FILE).read_text())
    assert len(told["tried"]) == len(find_lr.FACTORS)
    best = min(told["tried"], key=lambda row: row["held_out_loss"])
    assert told["learning_rate"] == best["learning_rate"]
    written = yaml.safe_load(RunFolder(config.out).config.read_text())
    assert (written["learning_rate"], written["find_lr"]) == (best["learning_rate"], False)
    assert max(row["learning_rate"] for row in RunFolder(config.out).rows() if "loss" in row) == best["learning_rate"]


def test_the_rates_are_around_the_one_auto_picks_and_the_runs_short(config, monkeypatch):
    seen = []
    real = loop.Loop.go

    def go(self, interrupt):
        seen.append([(run.job.rate.value, run.job.steps) for run in self.runs])
        return real(self, interrupt)

    monkeypatch.setattr(loop.Loop, "go", go)
    train(config.replace(steps=200, eval_every=200, patience=0, out=config.out + "-long"), QUIET)
    tried, ((chosen, steps),) = seen
    centre = tried[2][0]
    assert [rate / centre for rate, _ in tried] == pytest.approx(find_lr.FACTORS, rel=0.02)
    assert {steps for _, steps in tried} == {20}  # a tenth
    assert (chosen in [rate for rate, _ in tried], steps) == (True, 200)


def test_a_resumed_run_does_not_look_again(config, monkeypatch):
    first = train(config, QUIET)
    monkeypatch.setattr(find_lr, "_try", None)
    assert train(config, QUIET).best_loss == first.best_loss
    assert train(config.replace(find_lr=False, learning_rate=_found(config)), QUIET).step == 12  # its own config.yaml


def _found(config) -> float:
    return json.loads((Path(config.out) / find_lr.FILE).read_text())["learning_rate"]


def test_nothing_held_out_is_no_obstacle(make_config):
    config = make_config(learning_rate="auto", find_lr=True, steps=3, validation=0)
    train(config, QUIET)
    told = json.loads((Path(config.out) / find_lr.FILE).read_text())
    assert told["learning_rate"] == min(told["tried"], key=lambda row: row["loss"])["learning_rate"]


def test_a_signal_while_looking_stops_and_keeps_nothing(config, monkeypatch):
    real = loop.Loop._step

    def stepped(self, going):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, going)

    monkeypatch.setattr(loop.Loop, "_step", stepped)
    with pytest.raises(TrainError, match="stopped by SIGINT during the search for a learning rate"):
        train(config, QUIET)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 1e-3}, "find_lr searches for a learning rate, but learning_rate is 0.001"),
        ({"learning_rate": "auto", "method": "full"}, "which method: full does not allow"),
        ({"learning_rate": "auto", "bias": "all"}, "which bias does not allow"),
        ({"learning_rate": "auto", "save_modules": ["norm"]}, "which save_modules does not allow"),
    ],
)
def test_where_it_cannot_be_looked_for_is_said(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(find_lr=True, **changes)
