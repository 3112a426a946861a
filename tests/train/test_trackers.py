"""TensorBoard and Weights & Biases: only if asked for, and said at once if not installed."""

from __future__ import annotations

import sys
import types

import pytest

from lorakit.errors import TrainError
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_at_once(make_config, tmp_path, monkeypatch, name):
    monkeypatch.setattr("lorakit.train.trackers.importlib.util.find_spec", lambda _: None)
    with pytest.raises(TrainError, match=rf"{name} is not installed\n.*lorakit\[{name}\]"):
        train(make_config(track=[name]), QUIET)
    assert not (tmp_path / "run").exists()


def test_trackers_that_were_not_asked_for_are_not_imported(make_config):
    train(make_config(steps=1), QUIET)
    assert not {"wandb", "tensorboard", "torch.utils.tensorboard"} & set(sys.modules)


def test_numbers_go_to_the_tracker_that_was_asked_for(make_config, monkeypatch):
    """With a stand-in for TensorBoard, which need not be installed."""
    logged = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, key, value, step):
            logged.append((key, value, step))

        def close(self):
            logged.append("closed")

    monkeypatch.setattr("lorakit.train.trackers.importlib.util.find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    config = make_config(track=["tensorboard"], steps=2)
    train(config, QUIET)
    assert logged[-1] == "closed"
    assert {key for key, *_ in logged[:-1]} >= {"loss", "learning_rate", "held_out_loss"}
    assert [value for key, value, _ in logged[:-1] if key == "loss"] == [
        row["loss"] for row in RunFolder(config.out).rows() if "loss" in row
    ]
