"""`compile: true`: the same run through inductor; graphs are few; a resumed run ends with the same bits; refused where
unknown to be right.
"""

from __future__ import annotations

import shutil

import pytest
import tiny_lm
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError, TrainError
from lorakit.tasks import causal_lm
from lorakit.tasks.text.causal_loss import row_losses
from lorakit.train import compile as compiling
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.sweep.sweep_config import check_joint
from lorakit.train.train import train

QUIET = Progress(quiet=True)
needs_compiler = pytest.mark.skipif(compiling.no_compiler() is not None, reason="no C++ compiler for inductor")


@needs_compiler
def test_a_compiled_run_learns_the_same_and_resumes_to_the_last_bit(make_config, tmp_path):
    config = make_config(
        out=tmp_path / "whole", steps=6, save_every=2, keep=3, dropout=0.1, compile=True, eval_every=3, sample_tokens=2
    )
    train(config, QUIET)
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    for step in (4, 6):  # as if the run had been killed after its second step
        shutil.rmtree(resumed.checkpoints / f"step-{step}")
    shutil.rmtree(resumed.adapter)
    torch._dynamo.reset()  # what a new process starts with
    train(config.replace(out=str(resumed.path)), QUIET)
    names = "adapter_model.safetensors"
    assert (whole.adapter / names).read_bytes() == (resumed.adapter / names).read_bytes()
    losses = [[row["loss"] for row in folder.rows() if "loss" in row] for folder in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


@needs_compiler
def test_layers_share_one_graph_and_varied_lengths_need_no_other(make_config):
    torch._dynamo.reset()
    model = tiny_lm.llama().train()
    lk.attach(model, lk.LoraConfig(rank=4))
    plain = {"input_ids": torch.arange(30).view(3, 10), "labels": torch.arange(30).view(3, 10)}
    expected = row_losses(model, plain)
    before = compiling.graphs()
    said = compiling.compile_layers(model, {4}, 32, causal_lm)
    made = compiling.graphs() - before
    assert "2 layers" in said
    assert made <= 2, "one for the first layer, whose input takes no gradient, and one for the others"
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(row_losses(model, plain), expected, atol=1e-4, rtol=1e-5)
    for rows, length in ((2, 9), (4, 17), (3, 40), (2, 64)):
        ids = torch.arange(rows * length).view(rows, length) % 258
        row_losses(model, {"input_ids": ids, "labels": ids}).sum().backward()
    assert compiling.graphs() - before == made


@pytest.mark.parametrize(
    "most, batch, rows, expected",
    [(4, 8, 80, {4}), (4, 9, 90, {4, 1}), (4, 8, 81, {4, 1}), (1, 8, 80, {1}), (4, 8, 85, {4, 1})],
)
def test_single_rows_get_a_graph_only_where_they_come(most, batch, rows, expected):
    assert compiling.row_counts(most, batch, rows) == expected


def test_repeated_layers_are_those_that_train():
    model = nn.ModuleDict(
        {
            "towers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)]),
            "mixed": nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]),
            "frozen": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
        }
    )
    lk.attach(model, lk.LoraConfig(rank=2, targets=["towers.0.0", "towers.2.0"]))
    assert compiling.repeated_layers(model) == [model["towers"][0], model["towers"][2]]


def test_a_model_without_repeated_layers_is_refused():
    with pytest.raises(TrainError, match="no repeated layers"):
        compiling.compile_layers(nn.Sequential(nn.Linear(4, 4)), {2}, 8, causal_lm)


def test_without_a_compiler_it_says_so_before_anything_is_written(make_config, monkeypatch, tmp_path):
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(TrainError, match="no C\\+\\+ compiler was found"):
        train(make_config(compile=True), QUIET)
    assert not (tmp_path / "run").exists()


def test_what_is_not_known_to_be_right_is_refused(make_config):
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        make_config(compile=True, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="lorakit train"):
        check_joint(make_config(compile=True))
    with pytest.raises(ConfigError, match="2 processes"):
        compiling.check(make_config(compile=True), torch.device("cpu"), 2)
    with pytest.raises(ConfigError, match="mps"):
        compiling.check(make_config(compile=True), torch.device("mps"), 1)
