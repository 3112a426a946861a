"""Runs whose adapter does not start at random: the base beside it, resumed to the bit, in a sweep, continued."""

from __future__ import annotations

import shutil

import pytest
import quantized
import tiny_pictures
import torch

import lorakit as lk
from lorakit.bases.load import load_model
from lorakit.errors import AdapterError, ConfigError
from lorakit.model import start
from lorakit.plan.planner import Planner
from lorakit.train import resume
from lorakit.train.memory import planner_for
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.start import resolved
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")
STARTS = ("pissa", "milora", "olora", "eva", "lora_ga")
SHORT = {"steps": 4, "rank": 2, "learning_rate": 1e-2, "init_batches": 2, "eval_every": 4}


def settings(init: str, **more):
    own = SHORT if init in ("eva", "lora_ga") else {k: v for k, v in SHORT.items() if k != "init_batches"}
    return own | {"init": init} | more


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(2, 34)[None]).logits


@pytest.mark.parametrize("init", STARTS)
def test_the_result_is_a_plain_lora_of_the_base(make_config, init):
    config = make_config(**settings(init))
    job = set_up(config)
    base = logits(load_model(config.model, torch.float32, CPU))
    torch.testing.assert_close(logits(job.model), base, atol=1e-5, rtol=0)
    result = train(config, QUIET)
    adapter = lk.Adapter.load(result.adapter)
    assert adapter.config.init == "default"
    assert adapter.metadata["recipe"]["init"] == init
    modules = sum(hasattr(m, "lora_default") for m in job.model.modules())
    assert sum(f.rank for f in adapter.factors.values()) == (4 * modules if init != "eva" else 2 * 14)
    model = lk.attach(load_model(config.model, torch.float32, CPU), adapter)
    assert (logits(model) - base).abs().max() > 1e-3


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("more", [{"dropout": 0.2}, {"freeze_a": True}], ids=["dropout", "freeze_a"])
def test_a_killed_run_ends_with_the_same_bits(make_config, tmp_path, monkeypatch, init, more):
    config = make_config(out=tmp_path / "whole", **settings(init, save_every=2, keep=3, **more))
    train(config, QUIET)
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-4")
    shutil.rmtree(resumed.path / "adapter")
    if "freeze_a" not in more:  # nothing is computed again, as the checkpoint holds it all
        monkeypatch.setattr(start, "_evidence", lambda *args: pytest.fail("the start was made again"))
    train(config.replace(out=str(resumed.path)), QUIET)
    for file in (whole.path / "adapter").rglob("*.safetensors"):
        assert file.read_bytes() == (resumed.path / file.relative_to(whole.path)).read_bytes()


def test_a_checkpoint_holds_the_frozen_pair(make_config):
    config = make_config(**settings("pissa", save_every=2))
    train(config, QUIET)
    loaded = resume.read(RunFolder(config.out).checkpoints / "step-4")
    frozen = {name.rpartition(".")[2] for name in loaded.buffers}
    assert frozen == {"A0", "B0"}
    assert resume.newest_ranks(RunFolder(config.out).checkpoints)


def test_a_run_continues_from_it_as_a_plain_lora_of_twice_the_rank(make_config, tmp_path):
    first = train(make_config(out=tmp_path / "first", **settings("pissa")), QUIET)
    config = make_config(out=tmp_path / "next", **settings("pissa"), adapter=str(first.adapter))
    assert (resolved(config).init, resolved(config).rank) == ("default", 4)
    second = train(config, QUIET)
    assert lk.Adapter.load(second.adapter).config.rank == 4
    with pytest.raises(ConfigError, match="rank: the adapter has 4, given is 3"):
        resolved(config.replace(rank=3))


def test_runs_of_a_sweep_have_starts_of_their_own(make_config, tmp_path):
    base = make_config(**settings("eva")).model_dump(exclude_unset=True)
    values = {k: v for k, v in base.items() if k not in ("out", "init", "init_batches")} | {"sample_tokens": 0}
    joint = expand(values | {"init": ["default", "pissa", "eva", "lora_ga"], "out": str(tmp_path / "sweep")})
    sweep(joint, SweepProgress(quiet=True))
    for init, own in zip(("default", "pissa", "eva", "lora_ga"), joint.runs.values(), strict=True):
        assert own.init == init
        alone = train(own.replace(out=str(tmp_path / f"alone-{init}")), QUIET)
        together = lk.Adapter.load(RunFolder(own.out).adapter)
        for module, f in lk.Adapter.load(alone.adapter).factors.items():
            torch.testing.assert_close(together.factors[module].delta(), f.delta(), atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("init", [*STARTS, "loftq"])
def test_memory_is_planned_without_weights_and_data(make_config, init):
    config = make_config(**settings(init))
    planner = planner_for(config, torch.float32, CPU)
    assert isinstance(planner, Planner)
    random = planner_for(make_config(**settings("default")), torch.float32, CPU)
    more = planner.estimate(1, 8).total - random.estimate(1, 8).total
    assert more > 0 if init in ("pissa", "milora", "olora", "lora_ga") else more == 0


def test_loftq_of_a_base_that_is_quantized_while_loading(make_config, tmp_path):
    dense, packed = quantized.save(tmp_path)
    config = make_config(model=dense, **settings("loftq", quantize="nf4", save_every=2, keep=3))
    result = train(config, QUIET)
    adapter = lk.Adapter.load(result.adapter)
    assert adapter.metadata["only_on_quantized"] == "bitsandbytes, 4 bits"
    with pytest.raises(AdapterError, match="quantized in that way only"):
        lk.attach(load_model(str(dense), torch.float32, CPU), adapter)
    with pytest.raises(ConfigError, match="give the unquantized checkpoint"):
        train(make_config(model=packed, out=tmp_path / "other", **settings("loftq")), QUIET)


@pytest.mark.parametrize("init", ["eva", "lora_ga", "pissa"])
def test_a_run_on_pictures_starts_so_too(tmp_path, init):
    model = tiny_pictures.save_pipeline(tmp_path / "sd1")
    data = tiny_pictures.write_pictures(tmp_path / "pictures", 4)
    own = {"init_batches": 2} if init != "pissa" else {}
    config = tiny_pictures.config(model, data, tmp_path / "run", init=init, targets=["to_q", "conv1"], steps=2, **own)
    result = train(config, QUIET)
    ranks = {f.rank for f in lk.Adapter.load(result.adapter).factors.values()}
    assert ranks == {4} or init == "eva"
