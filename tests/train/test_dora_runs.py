"""Runs that train DoRA: interrupted and resumed, started from an adapter, merged into files, read by PEFT."""

from __future__ import annotations

import peft
import pytest
import tiny_lm
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import ConfigError
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)
IDS = torch.arange(5, 60).view(1, -1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder, data_file):
    """The adapter of a finished run."""
    out = tmp_path_factory.mktemp("dora") / "run"
    return train(tiny_lm.config(model_folder, data_file, out, **SETTINGS), QUIET).adapter


SETTINGS = {
    "variant": "dora",
    "rank": 3,
    "alpha": 7.0,
    "dropout": 0.1,
    "targets": ["q_proj", "down_proj", "embed_tokens"],
    "steps": 6,
    "save_every": 2,
    "eval_every": 3,
    "learning_rate": 2e-2,
}


def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(trained, make_config, monkeypatch):
    config = make_config(**SETTINGS)
    log = RunFolder.log

    def interrupted(folder, row):
        log(folder, row)
        if row["step"] == 5 and "loss" in row:
            raise RuntimeError("the machine is gone")

    monkeypatch.setattr(RunFolder, "log", interrupted)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(config, QUIET)
    monkeypatch.setattr(RunFolder, "log", log)
    result = train(config, QUIET)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (result.adapter / name).read_bytes() == (trained / name).read_bytes()


def test_it_has_learnt_and_peft_computes_the_same_with_it(trained, model_folder):
    value = lk.Adapter.load(trained)
    assert {u.variant for u in value.updates.values()} == {"dora"}
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    norms = {
        m: (W if "embed" not in m else W.T).norm(dim=1) for m in value.updates for W in [base.get_submodule(m).weight]
    }
    assert all(not torch.allclose(u.magnitude.flatten(), norms[m], rtol=1e-3) for m, u in value.updates.items())
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), trained).eval()
    ours = lk.attach(base, value)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_merged_into_files_it_is_what_it_is_merged_live(trained, model_folder, tmp_path):
    merge_checkpoint(model_folder, lk.Adapter.load(trained), tmp_path / "merged")
    files = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    live = lk.attach(AutoModelForCausalLM.from_pretrained(model_folder), lk.Adapter.load(trained))
    lk.merge(live)
    weights = lk.detach(live, merged="keep").state_dict()
    assert weights.keys() == files.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(files[name], weight, rtol=2e-7, atol=1e-9, msg=name)


def test_a_run_goes_on_from_it_and_stays_a_dora(trained, make_config, tmp_path):
    config = make_config(adapter=str(trained), rank=3, steps=2, out=tmp_path / "second")
    result = train(config, QUIET)
    before, after = lk.Adapter.load(trained), lk.Adapter.load(result.adapter)
    assert before.updates.keys() == after.updates.keys()
    for module, update in after.updates.items():
        assert update.variant == "dora"
        assert not torch.equal(update.magnitude, before.updates[module].magnitude)
    with pytest.raises(ConfigError, match="variant: the adapter has 'dora'"):
        train(config.replace(out=str(tmp_path / "third"), variant="loha"), QUIET)
