"""VeRA as a value and on a model: one copy of its matrices, an exact LoRA, and files that do not tell its sizes."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import peft
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.adapter.algebra.edit import as_lora
from lorakit.adapter.vera import Vera
from lorakit.analysis.inspect import describe_adapter
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, ConfigError, TargetError
from lorakit.export import export
from lorakit.formats.convert import convert

CONFIG = lk.LoraConfig(variant="vera", rank=5, targets=["q_proj", "down_proj"])


@pytest.fixture
def model():
    return tiny.randomise_factors(lk.attach(tiny.llama(), CONFIG), size=1.0).eval()


def projections(model) -> list:
    return [m.lora_default.projection for _, m in model.named_modules() if hasattr(m, "lora_default")]


def test_all_modules_share_one_copy_of_the_matrices_also_in_copies_and_captures(model):
    own = projections(model)
    assert len(own) > 2
    assert all(p is own[0] for p in own)
    copied = copy.deepcopy(model)
    assert all(p is projections(copied)[0] for p in projections(copied))
    assert projections(copied)[0] is not own[0]
    assert all(u.projection is own[0] for u in lk.capture(model).updates.values())
    again = pickle.loads(pickle.dumps(lk.capture(model)))
    assert len({id(u.projection) for u in again.updates.values()}) == 1
    pairs = [m.lora_default.pair(m) for _, m in model.named_modules() if hasattr(m, "lora_default")]
    assert len({pair.A.untyped_storage().data_ptr() for pair in pairs}) == 1
    assert {n.rpartition(".")[2] for n in model.state_dict() if ".lora_" in n} == {"d", "b"}


def test_a_seed_gives_the_same_and_another_one_other_matrices():
    made = [projections(lk.attach(tiny.llama(), CONFIG.replace(vera_seed=seed)))[0] for seed in (0, 0, 1)]
    assert torch.equal(made[0].A, made[1].A)
    assert torch.equal(made[0].B, made[1].B)
    assert not torch.equal(made[0].A, made[2].A)


def test_it_is_the_lora_that_it_converts_to(model, tmp_path):
    adapter = lk.capture(model)
    plain = as_lora(adapter)
    assert {u.variant for u in plain.updates.values()} == {"lora"}
    assert plain.config.variant == "lora"
    found = tiny.logits(lk.attach(tiny.llama(), plain).eval())
    torch.testing.assert_close(found, tiny.logits(model), atol=1e-6, rtol=1e-6)
    done = convert(adapter, tmp_path / "x.npz.d", "mlx")
    assert done.lost == []
    again = lk.attach(tiny.llama(), lk.Adapter.load(done.path), force=True).eval()
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model), atol=1e-5, rtol=1e-5)
    assert {u.variant for u in adapter.resize(rank=5).updates.values()} == {"lora"}
    with pytest.raises(AdapterError, match="LoRAs in other tensors"):
        export(adapter, tmp_path / "out", "canonical")
    assert export(adapter, tmp_path / "out", "canonical", fix=True, verify=True).difference < 1e-5


def test_merged_in_files_it_is_what_it_is_on_the_model(model, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    lk.capture(model).save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), atol=1e-5, rtol=1e-5)
    facts = describe_adapter(lk.Adapter.load(tmp_path / "adapter"), str(tmp_path / "adapter"))
    assert {m.kind for m in facts.modules} == {"vera"}


@pytest.fixture(params=[True, False])
def from_peft(request, tmp_path):
    """A folder that PEFT wrote, with and without the random matrices; neither tells how many inputs a module has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.VeraConfig(r=5, target_modules=["q_proj", "down_proj"], save_projection=request.param)
        theirs = peft.get_peft_model(tiny.llama(), config).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if ".vera_lambda_" in name:
                    p.copy_(torch.randn(p.shape))
        theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", theirs, request.param


def test_what_needs_the_sizes_says_how_to_get_them(from_peft, tmp_path):
    folder, theirs, saved = from_peft
    adapter = lk.Adapter.load(folder)
    tiny.llama().save_pretrained(tmp_path / "base")
    for call in (
        lambda: adapter * 0.5,
        lambda: adapter.resize(rank=2),
        lambda: convert(adapter, tmp_path / "x", "mlx"),
    ):
        with pytest.raises(AdapterError, match=r"lorakit\.capture\(model\)\.save|merge the adapter into its base"):
            call()
    assert len(describe_adapter(adapter, str(folder)).modules) == len(adapter.updates)
    if saved:  # the checkpoint's shapes tell the rest
        merge_checkpoint(tmp_path / "base", folder, tmp_path / "merged")
        merged = type(tiny.llama()).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(tiny.logits(merged), tiny.logits(theirs), atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(AdapterError, match="save_projection: false"):
            merge_checkpoint(tmp_path / "base", folder, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    model = lk.attach(tiny.llama(), adapter).eval()
    lk.capture(model).save(tmp_path / "sized")
    sized = lk.Adapter.load(tmp_path / "sized")
    half = lk.attach(tiny.llama(), (0.5 * sized).resize(rank=5)).eval()
    lk.activate(model, {"default": 0.5})
    torch.testing.assert_close(tiny.logits(half), tiny.logits(model), atol=1e-5, rtol=1e-5)


def test_settings_that_it_has_not_are_refused():
    for settings, error, said in (
        ({"rank_pattern": {"q_proj": 2}}, TargetError, "one rank"),
        ({"alpha_pattern": {"q_proj": 2.0}}, ConfigError, "alpha_pattern has no effect: variant='vera' has no scale"),
        ({"alpha": 8.0}, ConfigError, "alpha has no effect: variant='vera' has no scale"),
        ({"rslora": True}, ConfigError, "rslora has no effect: variant='vera' has no scale"),
        ({"packed": {"q_proj": [True, False]}}, TargetError, "packed"),
    ):
        with pytest.raises(error, match=said):
            lk.attach(tiny.llama(), CONFIG.replace(**settings))
    with pytest.raises(TargetError, match="a convolution"):
        lk.attach(nn.Sequential(nn.Conv1d(2, 2, 1)), CONFIG.replace(targets=["0"]))


def test_one_of_another_size_does_not_fit(model):
    update = next(iter(lk.capture(model).updates.values()))
    assert update.layout((update.b.shape[0], update.size_in)) is False
    assert update.layout((update.b.shape[0], update.size_in + 1)) is None
    unsized = replace(update, size_in=None)
    assert unsized.layout((update.b.shape[0], 7)) is False
    assert unsized.layout((update.b.shape[0], 10_000)) is None
    assert isinstance(unsized.on_weight((update.b.shape[0], 7), False), Vera)
    assert unsized.on_weight((update.b.shape[0], 7), False).sizes == (update.b.shape[0], 7)
