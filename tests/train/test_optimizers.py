"""The optimizers that a run can have: their steps, their settings, the bytes of their state, and exact resume."""

from __future__ import annotations

import shutil

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn

import lorakit as lk
from lorakit.config.optimizers import OPTIMIZERS, state_bytes
from lorakit.errors import ConfigError
from lorakit.train import optimizer as optimizers
from lorakit.train.config import TrainConfig
from lorakit.train.lion import Lion
from lorakit.train.muon import muon_matrices
from lorakit.train.optimizer import build, update
from lorakit.train.progress import Progress, facts
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

QUIET = Progress(quiet=True)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = [name for name in OPTIMIZERS if name != "paged_adamw8bit"]  # that one needs a GPU


def config(optimizer: str, **settings) -> TrainConfig:
    return TrainConfig(data="x", optimizer=optimizer, learning_rate=1e-2, **settings)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def model_of(*shapes: tuple[int, ...]) -> nn.Module:
    return nn.ParameterList([nn.Parameter(0.3 * randn(*shape, seed=i)) for i, shape in enumerate(shapes)])


def steps(model: nn.Module, made: torch.optim.Optimizer, count: int = 3, rate: float = 1e-2) -> list[torch.Tensor]:
    """Train with the same gradients whatever the optimizer. Returns the parameters."""
    parameters = dict(model.named_parameters())
    for step in range(count):
        for i, p in enumerate(parameters.values()):
            p.grad = randn(*p.shape, seed=10 * step + i)
        if made.param_groups[0].get(optimizers.FACTOR) is None:  # another library's
            made.step()
        else:
            update(made, parameters, rate, 1.0, 0)
    return [p.detach() for p in parameters.values()]


SHAPES = ((8, 5), (7,))
# What each is to be equal to: another implementation, on the same parameters.
ORACLES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "lion": lambda p: bitsandbytes.optim.Lion32bit(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: transformers.Adafactor(
        p, lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.1, decay_rate=-0.8
    ),
    "adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", ORACLES)
def test_its_steps_are_those_of_another_implementation(name):
    ours, theirs = model_of(*SHAPES), model_of(*SHAPES)
    found = steps(ours, build(config(name, weight_decay=0.1), ours, dict(ours.named_parameters()), 1e-2))
    expected = steps(theirs, ORACLES[name](theirs.parameters()))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def test_lion_is_its_papers_algorithm():
    model = model_of((3, 4))
    (found,) = steps(model, Lion(model.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.5))
    theta, average = 0.3 * randn(3, 4).double(), torch.zeros(3, 4, dtype=torch.float64)
    for step in range(3):
        gradient = randn(3, 4, seed=10 * step).double()
        theta = theta - 1e-2 * (torch.sign(0.8 * average + 0.2 * gradient) + 0.5 * theta)
        average = 0.95 * average + 0.05 * gradient
    torch.testing.assert_close(found.double(), theta, rtol=1e-6, atol=1e-6)


def test_muon_moves_matrices_as_torchs_does_and_everything_else_as_adamw(tiny_llama):
    lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["embed_tokens", "q_proj"]))
    trained = {n: p for n, p in tiny_llama.named_parameters() if p.requires_grad}
    matrices = muon_matrices(tiny_llama, trained)
    assert {name.split(".")[-3] for name in matrices} == {"q_proj"}
    assert not muon_matrices(model_of((4,), (1, 6), (6, 1), (2, 3, 1, 1)), dict(enumerate(model_of((4,), (1, 6)))))
    ours, theirs = model_of((6, 4), (5,), (3, 1)), model_of((6, 4), (5,), (3, 1))
    found = steps(ours, build(config("muon"), ours, dict(ours.named_parameters()), 1e-2))
    matrix, *others = list(theirs.parameters())
    muon = torch.optim.Muon([matrix], lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1e-2 / 3, weight_decay=0)
    steps(theirs, _Both(muon, adamw))
    for one, other in zip(found, theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)


class _Both:
    def __init__(self, *parts):
        self.parts, self.param_groups = parts, [{}]

    def step(self):
        for part in self.parts:
            part.step()


@pytest.mark.parametrize("name", HERE)
def test_the_bytes_of_its_state_are_those_planned(name):
    shapes = [(64, 80), (80,), (16, 300), (8, 4, 3, 3)]
    model = model_of(*shapes)
    made = build(config(name), model, dict(model.named_parameters()), 1e-2)
    steps(model, made, 1)
    shared = {"qmap1", "qmap2"}  # one for all parameters
    held = sum(
        t.numel() * t.element_size()
        for state in made.state.values()
        for key, t in state.items()
        if isinstance(t, torch.Tensor) and t.dim() and key not in shared
    )
    assert held == state_bytes(name, model.parameters())


@pytest.mark.parametrize("name", HERE)
def test_a_killed_run_ends_with_the_same_bits(make_config, tmp_path, name):
    """With moving averages, accumulation and dropout."""
    settings = {"optimizer": name, "learning_rate": 1e-2, "ema": 0.5, "dropout": 0.1, "batch_size": 6, "micro_batch": 4}
    run = make_config(out=tmp_path / "whole", steps=4, save_every=2, keep=3, eval_every=2, **settings)
    result = train(run, QUIET)
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-4")
    shutil.rmtree(resumed.adapter)
    train(run.replace(out=str(resumed.path)), QUIET)
    for file in (
        "adapter/adapter_model.safetensors",
        *(f"checkpoints/step-4/{n}.safetensors" for n in ("trainable", "optimizer", "ema")),
    ):
        assert (whole.path / file).read_bytes() == (resumed.path / file).read_bytes(), file
    assert result.loss < whole.rows()[0]["loss"]


def test_a_sweep_trains_beside_each_other_what_each_trains_alone(make_config, tmp_path):
    """In the first steps, for all but the few elements whose gradient is near zero: Lion takes its sign."""
    run = make_config(sample_tokens=0, steps=2, learning_rate=1e-2, validation=0, patience=0, eval_every=2)
    plan = expand(run.model_dump() | {"out": str(tmp_path / "sweep"), "optimizer": ["adamw", "lion", "muon"]})
    sweep(plan, SweepProgress(quiet=True))
    for config in plan.runs.values():
        alone = train(config.replace(out=str(tmp_path / config.optimizer)), QUIET)
        ours, theirs = (
            torch.cat([t.flatten() for u in lk.Adapter.load(at).updates.values() for t in u.tensors().values()])
            for at in (RunFolder(config.out).adapter, alone.adapter)
        )
        assert ((ours - theirs).abs() > 1e-4).float().mean() < 0.01, config.optimizer


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "sgd", "beta1": 0.8}, r"beta1 has no effect with optimizer: sgd; remove it \(it is for adamw,"),
        ({"optimizer": "lion", "beta2": 0.9}, "beta2 has no effect with optimizer: lion"),
        ({"optimizer": "adafactor", "momentum": 0.9}, "momentum has no effect with optimizer: adafactor"),
        ({"momentum": 0.9}, r"momentum has no effect with optimizer: adamw; remove it \(it is for sgd, lion, muon\)"),
        ({"optimizer": "sgd", "momentum": 1.0}, "at least 0 and below 1"),
        ({"optimizer": "adamw4bit"}, "optimizer"),
    ],
)
def test_settings_without_an_effect_and_unknown_names_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(data="x", **settings)


def test_where_an_optimizer_does_not_work_it_is_refused_with_what_does(monkeypatch):
    with pytest.raises(ConfigError, match=r"paged_adamw8bit works on cuda and xpu, .* on cpu\n.*adamw8bit"):
        optimizers.check(config("paged_adamw8bit"), CPU)
    with pytest.raises(ConfigError, match=r"on mps\n.*adafactor or lion"):
        optimizers.check(config("adamw8bit"), torch.device("mps"))
    with pytest.raises(ConfigError, match="sgd has no automatic learning rate"):
        optimizers.check(TrainConfig(data="x", optimizer="sgd"), CPU)
    optimizers.check(config("paged_adamw8bit"), CUDA)
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        optimizers.check(config("adamw8bit"), CPU)


def test_the_start_panel_says_what_trains_and_at_which_rate(make_config):
    job = set_up(make_config(optimizer="muon", steps=200, learning_rate="auto"))
    said = dict(facts(job))
    assert said["optimizer"].startswith("Muon for 28 matrices, AdamW for 0 other parameters, beta1 0.9")
    assert "momentum 0.95" in said["optimizer"]
    assert "3 times AdamW's for Muon" in said["learning rate"]
    rates = {
        name: set_up(
            make_config(optimizer=name, steps=200, learning_rate="auto", out=job.folder.path.parent / name)
        ).rate
        for name in ("adamw", "lion")
    }
    assert rates["lion"].value == pytest.approx(rates["adamw"].value / 2, rel=0.05)
    assert rates["lion"].reason.endswith("half of AdamW's for Lion")
