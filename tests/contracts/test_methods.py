"""What every method of fine-tuning keeps: its settings are a run's, it trains what it says, its result loads, a killed
run ends the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
from pydantic import Field, field_validator

import lorakit as lk
from lorakit.bases.load import load_model
from lorakit.config import LoraSettings, Strict, joined
from lorakit.errors import ConfigError, LorakitError, StateError
from lorakit.methods import method_names, method_of
from lorakit.train import resume
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Interrupt, Loop
from lorakit.train.memory import planner_for
from lorakit.train.progress import Progress
from lorakit.train.run import Run
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.start import resolved
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.train import train

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")


def adapter_on(base: str, result: Path) -> Any:
    return lk.attach(load_model(base, torch.float32, CPU), lk.Adapter.load(result))


# How each result is loaded again, apart from lorakit's training: (base, result) -> model.
LOADED: dict[str, Callable[[str, Path], Any]] = {
    "bitfit": adapter_on,
    "bottleneck": adapter_on,
    "ia3": adapter_on,
    "layernorm": adapter_on,
    "lora": adapter_on,
    "p_tuning": adapter_on,
    "prefix": adapter_on,
    "prompt": adapter_on,
    "probe": adapter_on,
    "full": lambda base, result: load_model(str(result), torch.float32, CPU),
}


# What a method needs of a run besides the defaults.
NEEDS: dict[str, dict[str, Any]] = {"probe": {"save_modules": ["lm_head"]}}
# The methods that need another base than a Llama, which has no biases.
BASES = {"bitfit": tiny_lm.biased}


@pytest.fixture(params=method_names())
def method(request):
    return request.param


@pytest.fixture
def run_of(make_config, method, tmp_path_factory):
    """`run_of(**changes)`: a short run by the method."""
    base = {}
    if method in BASES:
        base["model"] = tiny_lm.save(tmp_path_factory.mktemp("base"), BASES[method]())
    return lambda **changes: make_config(**{"method": method, **base, **NEEDS.get(method, {}), **changes})


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(2, 34)[None]).logits


def test_every_method_has_a_row_here():
    assert LOADED.keys() == set(method_names())


def test_its_settings_are_settings_of_a_run(method):
    assert set(method_of(method).settings.model_fields) <= set(TrainConfig.model_fields)
    assert TrainConfig(data="rows.jsonl", method=method).method == method
    assert f"{method}: {method_of(method).summary}" in TrainConfig.model_fields["method"].description


def test_what_is_trained_is_what_is_planned_and_the_rest_stays(run_of, method):
    config = run_of(steps=3, learning_rate=1e-2, patience=0)
    job = set_up(config)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    trained = set(resume.trainable(job.model))
    planner = planner_for(config, torch.float32, CPU)
    estimate = planner.estimate(1, 8)
    assert estimate.trained == sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    assert estimate.parameters == sum(p.numel() for p in load_model(config.model, torch.float32, CPU).parameters())
    Loop([Run(job, QUIET)]).go(Interrupt())
    moved = {name for name, parameter in job.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved <= trained


def test_what_it_asks_of_the_loop_is_for_what_is_trained(run_of, method):
    """Its learning rates are of trained parameters, its penalty is a scalar, and after a step it may adjust them."""
    config = run_of(steps=2, learning_rate=1e-2)
    job = set_up(config)
    of_method, trained = method_of(method), resume.trainable(job.model)
    factors = of_method.rate_factors(job.model, config, job.adapter)
    assert {id(p) for p in factors} <= {id(p) for p in trained.values()}
    assert job.rate_factors(trained).keys() == trained.keys()
    penalty = of_method.penalty(job.model, job.adapter)
    assert penalty is None or (penalty.dim() == 0 and penalty.requires_grad)
    of_method.after_step(job.model, job.adapter, 1, 2)
    assert resume.trainable(job.model).keys() == trained.keys()


def test_its_result_loads_and_computes_as_the_run_ended(run_of, method):
    config = run_of(steps=3, learning_rate=1e-2, patience=0, eval_every=3)
    job = set_up(config)
    (result,) = Loop([Run(job, QUIET)]).go(Interrupt())
    assert result.adapter == job.result == Path(config.out) / method_of(method).result
    base = logits(load_model(config.model, torch.float32, CPU))
    tuned = logits(LOADED[method](config.model, result.adapter))
    torch.testing.assert_close(tuned, logits(job.model), atol=1e-5, rtol=0)
    assert (tuned - base).abs().max() > 1e-2


def test_the_base_can_be_had_beside_it_or_that_is_refused(run_of, method):
    config = run_of(steps=2, learning_rate=1e-2)
    job = set_up(config)
    base = logits(load_model(config.model, torch.float32, CPU))
    Loop([Run(job, QUIET)]).go(Interrupt())
    tuned = logits(job.model)
    if method_of(method).keeps_base:
        with method_of(method).base_alone(job.model):
            torch.testing.assert_close(logits(job.model), base, atol=1e-6, rtol=0)
        assert torch.equal(logits(job.model), tuned)
    else:
        with pytest.raises(StateError, match="base"):
            method_of(method).base_alone(job.model)


def test_a_killed_run_ends_with_the_same_bits(run_of, tmp_path, method):
    config = run_of(out=tmp_path / "whole", steps=4, save_every=2, keep=3, eval_every=2, learning_rate=1e-2)
    train(config, QUIET)
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-4")
    shutil.rmtree(resumed.path / method_of(method).result)
    train(config.replace(out=str(resumed.path)), QUIET)
    for file in (whole.path / method_of(method).result).rglob("*.safetensors"):
        assert file.read_bytes() == (resumed.path / file.relative_to(whole.path)).read_bytes()


def test_it_starts_from_an_earlier_adapter_or_says_why_not(make_config, run_of, method, tmp_path):
    of, own = method_of(method), {"rank": 3} if method == "lora" else {}
    assert of.start(run_of()) is None
    short = {"steps": 2, "learning_rate": 1e-2}
    if of.result != "adapter":
        first = train(make_config(**short, out=tmp_path / "first"), QUIET)
        with pytest.raises(ConfigError, match="adapter"):
            of.start(run_of(**short, out=tmp_path / "next", adapter=str(first.adapter)))
        return
    first = train(run_of(**short, **own, out=tmp_path / "first"), QUIET)
    config = run_of(**short, **own, out=tmp_path / "next", adapter=str(first.adapter))
    assert own.items() <= of.start(config).settings.items()
    assert of.start(config).settings.keys() <= {*of.settings.model_fields, "add_tokens"}
    result = train(resolved(config), QUIET)
    assert lk.Adapter.load(result.adapter).metadata["started_from"]["sha256"] == lk.Adapter.load(first.adapter).digest()


def test_it_trains_beside_others_or_says_why_not(method):
    asked = {"data": "rows.jsonl", "method": method, "seed": [0, 1]}
    if method_of(method).alone(TrainConfig(data="rows.jsonl", method=method)) is None:
        assert len(expand(asked).runs) == 2
        assert TrainConfig(data="rows.jsonl", method=method, find_lr=True).find_lr
        return
    with pytest.raises(ConfigError, match="lorakit train"):
        expand(asked)
    with pytest.raises(LorakitError, match="does not allow"):
        TrainConfig(data="rows.jsonl", method=method, find_lr=True)


def test_the_flags_it_names_judge_its_result(method):
    words = method_of(method).flags("a base", "an out")
    assert "'an out'" in words
    assert words.startswith("--model")


def test_a_setting_that_two_parts_define_is_refused():
    class Mine(Strict):
        rank: int = Field(3, description="of something else")

    class Checked(Strict):
        _ranks = field_validator("*")(lambda value: value)

    with pytest.raises(TypeError, match="'rank' is a setting of LowRank and of Mine"):
        joined("Both", [LoraSettings, Mine])
    with pytest.raises(TypeError, match="'_ranks' is a setting of LoraSettings and of Checked"):
        joined("Both", [LoraSettings, Checked])
