"""Runs on rows longer than the base's positions, with checkpoints of layers kept in files."""

from __future__ import annotations

import json

import pytest
import tiny_lm
import torch

import lorakit as lk
from lorakit.cli import run
from lorakit.errors import ConfigError, LorakitError
from lorakit.layers import offload
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    rows = [{"prompt": f"{name}: ", "completion": f"{name} " + "goes on " * 15} for name in tiny_lm.NAMES]
    return str(tiny_lm.write_rows(tmp_path_factory.mktemp("long") / "long.jsonl", rows))


@pytest.fixture
def long_config(make_config, long_rows):
    def of(**changes) -> TrainConfig:
        return make_config(**{"data": long_rows, "steps": 4, "learning_rate": 1e-2, "rope_scaling": "yarn:4"} | changes)

    return of


def test_rows_beyond_the_positions_need_them_scaled(long_config):
    with pytest.raises(LorakitError, match="longer than max_length 96"):
        train(long_config(rope_scaling=None), QUIET)
    with pytest.raises(ConfigError, match=r"max_length: 200.*\n.*rope_scaling: yarn:3"):
        train(long_config(rope_scaling=None, max_length=200), QUIET)


def test_such_a_run_learns_and_its_result_is_used_with_its_positions(long_config, long_rows, tmp_path, capsys):
    config = long_config(out=tmp_path / "run", steps=12)
    result = train(config, QUIET)
    assert lk.Adapter.load(result.adapter).metadata["rope_scaling"] == "yarn:4"
    assert (
        run(["eval", long_rows, "--model", config.model, "--adapter", str(result.adapter), "--no-text", "--json"]) == 0
    )
    base, tuned = json.loads(capsys.readouterr().out)["results"]
    assert tuned["loss"] < base["loss"]
    assert run(["predict", long_rows, "--model", config.model, "--adapter", str(result.adapter), "--limit", "1"]) == 0
    capsys.readouterr()
    on = train(TrainConfig(data=long_rows, adapter=str(result.adapter), steps=2, out=str(tmp_path / "on")), QUIET)
    assert lk.Adapter.load(on.adapter).metadata["rope_scaling"] == "yarn:4"


def test_offloaded_checkpoints_change_nothing_but_memory(long_config, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "SMALL", 64)
    read = []
    monkeypatch.setattr(offload, "_read", lambda kept, own=offload._read: (read.append(kept), own(kept))[1])
    kept = train(long_config(out=tmp_path / "kept", gradient_checkpointing=True), QUIET)
    assert not read
    moved = train(long_config(out=tmp_path / "moved", gradient_checkpointing=True, offload_activations=True), QUIET)
    assert sum(not isinstance(each, torch.Tensor) for each in read) >= 2 * 4  # of two layers, in four steps
    file = "adapter_model.safetensors"
    assert (kept.adapter / file).read_bytes() == (moved.adapter / file).read_bytes()


def test_offload_alone_is_refused():
    with pytest.raises(ConfigError, match="gradient_checkpointing keeps, and that is off"):
        TrainConfig(data="x.jsonl", offload_activations=True)


def test_a_wrong_scaling_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="did you mean 'yarn'"):
        TrainConfig(data="x.jsonl", rope_scaling="yarm:4")
