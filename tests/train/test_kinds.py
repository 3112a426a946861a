"""Runs that train LoHa, LoKr, VeRA and tokens: they resume to the same bits, are started from, and PEFT loads them."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)
KINDS = {
    "loha": {"variant": "loha"},
    "lokr": {"variant": "lokr", "lokr_factor": 4, "lokr_both": True},
    "vera": {"variant": "vera", "rank": 32, "vera_seed": 5, "learning_rate": 5e-2},
}


def given(make_config, tmp_path, kind: str, **more):
    settings = {"steps": 4, "save_every": 2, "validation": 0, "sample_tokens": 0, "targets": ["q_proj", "down_proj"]}
    return make_config(**{**settings, "out": tmp_path / "run", **KINDS[kind], **more})


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_to_the_same_bits_and_peft_loads_its_result(kind, make_config, tmp_path, model_folder):
    config = given(make_config, tmp_path, kind, **({} if kind == "lokr" else {"dropout": 0.1}))
    result = train(config, QUIET)
    adapter = lk.Adapter.load(result.adapter)
    assert {u.variant for u in adapter.updates.values()} == {kind}
    assert not any(u.is_zero() for u in adapter.updates.values())
    other = RunFolder(tmp_path / "other")
    shutil.copytree(config.out, other.path)
    shutil.rmtree(other.checkpoints / "step-4")
    train(config.replace(out=str(other.path)), QUIET)
    for file in ("adapter_model.safetensors", "lorakit.json"):
        assert (other.adapter / file).read_bytes() == (RunFolder(config.out).adapter / file).read_bytes()

    def base():
        return AutoModelForCausalLM.from_pretrained(model_folder).eval()

    ids = torch.arange(3, 40)[None]
    ours, theirs = lk.attach(base(), adapter), peft.PeftModel.from_pretrained(base(), result.adapter)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_another_ones_result(kind, make_config, tmp_path):
    first = train(given(make_config, tmp_path, kind), QUIET).adapter
    settings = {"steps": 2, "validation": 0, "sample_tokens": 0, "out": tmp_path / "second", "adapter": str(first)}
    config = make_config(**settings)
    values = {name: value for name, value in config.model_dump(exclude_unset=True).items() if name != "rank"}
    second = lk.Adapter.load(train(type(config)(**values), QUIET).adapter)
    before = lk.Adapter.load(first)
    assert second.updates.keys() == before.updates.keys()
    assert {u.variant for u in second.updates.values()} == {kind}
    for module, update in second.updates.items():
        known = before.updates[module].tensors()
        assert all(t.shape == known[name].shape for name, t in update.tensors().items())
        assert any(not torch.equal(t, known[name]) for name, t in update.tensors().items())
        assert (update.matrix() - before.updates[module].matrix()).norm() < before.updates[module].matrix().norm() + 1
