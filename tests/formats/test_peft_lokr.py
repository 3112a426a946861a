"""PEFT's LoKr folder, both ways, with the real PEFT as the judge; training with the same factors as PEFT."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.lokr import Lokr, divided
from lorakit.errors import AdapterError
from lorakit.formats import losses
from lorakit.formats.peft import CONFIG, WEIGHTS

TIGHT = {"atol": 2e-5, "rtol": 1e-5}
CASES = {
    "llama": (tiny.llama, {"targets": "all-linear", "task": "CAUSAL_LM"}, {}),
    "products of both": (
        tiny.llama,
        {"targets": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "lokr_both": True, "lokr_factor": 8},
        {"decompose_both": True, "decompose_factor": 8},
    ),
    "a factor": (tiny.llama, {"targets": ["q_proj", "up_proj"], "lokr_factor": 4}, {"decompose_factor": 4}),
    "full matrices": (tiny.llama, {"targets": ["q_proj", "up_proj"], "rank": 64, "alpha": 96.0}, {}),
    "bert, its head saved": (
        tiny.bert,
        {"targets": ["query", "value"], "save_modules": ["classifier"], "task": "SEQ_CLS"},
        {},
    ),
    "convolutions": (lambda: tiny.cnn(dilation=1), {"targets": ["conv1", "conv2", "head"], "rank": 1}, {}),
    "convolutions with a full W2": (lambda: tiny.cnn(dilation=1), {"targets": ["conv2"], "rank": 9}, {}),
    "grouped convolutions": (lambda: tiny.cnn(groups=2, dilation=1), {"targets": ["conv2"], "rank": 1}, {}),
}


def ours(make, settings) -> tuple[torch.nn.Module, lk.Adapter]:
    model = lk.attach(make(), lk.LoraConfig(**{"variant": "lokr", "rank": 3, "alpha": 5.0, **settings}))
    tiny.randomise_factors(model)
    return model.eval(), lk.capture(model)


@pytest.mark.parametrize("case", CASES)
def test_trained_here_it_gives_the_same_in_peft(case, tmp_path):
    make, settings, fields = CASES[case]
    model, adapter = ours(make, settings)
    adapter.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), **TIGHT)
    assert (tiny.logits(theirs) - tiny.logits(make().eval())).abs().max() > 1e-3
    written = json.loads((tmp_path / CONFIG).read_text())
    assert set(written) <= {f.name for f in peft.LoKrConfig.__dataclass_fields__.values()}
    assert fields == {name: written[name] for name in fields}
    if settings.get("lokr_both"):
        assert any(u.w1a is not None for u in adapter.updates.values())


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_trained_in_peft_it_gives_the_same_here_and_comes_back_the_same(case, effective, tmp_path):
    make, settings, fields = CASES[case]
    targets = ["q_proj", "up_proj"] if settings["targets"] == "all-linear" else settings["targets"]
    if effective:
        targets = [target for target in targets if target != "conv1"]  # PEFT 0.21 fails in its product
    torch.manual_seed(1)
    config = peft.LoKrConfig(
        r=settings.get("rank", 3),
        alpha=5,
        target_modules=targets,
        init_weights=False,
        modules_to_save=settings.get("save_modules"),
        rank_pattern=settings.get("rank_pattern", {}),
        use_effective_conv2d=effective,
        task_type=settings.get("task"),
        **fields,
    )
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = lk.Adapter.load(tmp_path / "theirs")
    assert {type(u) for u in adapter.updates.values()} == {Lokr}
    assert adapter.config.variant == "lokr"
    model = lk.attach(make(), adapter).eval()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(theirs), **TIGHT)
    for value, folder in ((lk.capture(model), "again"), (adapter, "unread")):  # with the kernels known, and not
        value.save(tmp_path / folder)
        first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", folder))
        assert first.keys() == second.keys()
        # The scale of two full matrices goes into W1.
        scaled = {key.replace("lokr_w2", "lokr_w1") for key in first if key.endswith("lokr_w2")}
        assert all(torch.equal(t, second[key]) for key, t in first.items() if key not in scaled)
        again = peft.PeftModel.from_pretrained(make(), tmp_path / folder).eval()
        torch.testing.assert_close(tiny.logits(again), tiny.logits(theirs), **TIGHT)


@pytest.mark.parametrize("case", ["llama", "products of both", "convolutions"])
def test_its_gradients_are_those_of_peft(case, tmp_path):
    make, settings, _ = CASES[case]
    model, adapter = ours(make, settings)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval()
    for each in (model, theirs):
        base = each.get_base_model() if each is theirs else each
        out = each(**tiny.example(base)) if hasattr(base, "config") else each(*tiny.example(base).values())
        getattr(out, "logits", out).square().sum().backward()
    found = {n.replace(".lora_default.", "."): p.grad for n, p in model.named_parameters() if ".lora_default." in n}
    compared = 0
    for name, p in theirs.named_parameters():
        if ".lokr_" in name:
            module, _, part = name.removeprefix("base_model.model.").removesuffix(".default").rpartition(".lokr_")
            mine = found[f"{module}.{part.replace('_', '')}"]
            torch.testing.assert_close(mine, p.grad, atol=1e-6 * max(1.0, float(p.grad.abs().max())), rtol=1e-5)
            compared += 1
    assert compared == len(found) > 0


def test_peft_starts_it_as_we_do():
    for settings, fields in (({}, {}), ({"lokr_both": True, "lokr_factor": 8}, {"decompose_both": True})):
        model = lk.attach(tiny.mlp(), lk.LoraConfig(variant="lokr", rank=1, targets=["lin0"], **settings))
        mine = lk.capture(model).updates["lin0"].tensors()
        config = peft.LoKrConfig(
            r=1, target_modules=["lin0"], decompose_factor=settings.get("lokr_factor", -1), **fields
        )
        theirs = peft.get_peft_model(tiny.mlp(), config).base_model.model.lin0
        for name, t in mine.items():
            other = getattr(theirs, f"lokr_{name[:2]}_{name[2]}" if len(name) > 2 else f"lokr_{name}")["default"]
            assert t.shape == other.shape
            assert bool(t.any()) == bool(other.any())


@pytest.mark.parametrize("factor", [None, 2, 3, 4, 7, 16, 100])
def test_axes_are_divided_as_in_peft(factor):
    from peft.tuners.lokr.layer import factorization

    for size in (*range(1, 130), 768, 1408, 4096, 11008):
        assert divided(size, factor) == factorization(size, -1 if factor is None else factor)


def test_what_the_folder_cannot_hold_is_listed(tmp_path):
    _, adapter = ours(tiny.bert, {"targets": ["query"], "bias": "lora_only"})
    assert "trained biases" in "\n".join(losses(adapter, "peft"))
    w = torch.ones
    odd = {"a": Lokr(1.0, w1=w(2, 4), w2=w(4, 2)), "b": Lokr(1.0, w1=w(4, 2), w2=w(2, 4))}
    mixed = lk.Adapter(lk.LoraConfig(targets=["a", "b"]), odd)
    assert "one decompose_factor" in "\n".join(losses(mixed, "peft"))
    with pytest.raises(AdapterError, match="decompose_factor"):
        mixed.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    deep = lk.Adapter(lk.LoraConfig(targets=["a"]), {"a": Lokr(1.0, w1=w(2, 2), w2=w(2, 2, 2, 2, 2))})
    assert "no Conv3d" in "\n".join(losses(deep, "peft"))


def test_a_conv1d_with_a_full_second_factor_is_read_as_what_peft_computes(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 6, 3))

    config = peft.LoKrConfig(r=8, alpha=5, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    update = adapter.updates["0"]
    assert isinstance(update, Dense)
    changed = make()
    with torch.no_grad():
        changed[0].weight += update.delta(tuple(changed[0].weight.shape))
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(changed(x), theirs(x), **TIGHT)
    value = lk.capture(lk.attach(make(), lk.LoraConfig(variant="lokr", rank=8, targets=["0"])))
    assert "another product" in "\n".join(losses(value, "peft"))


@pytest.mark.parametrize("wrong", ["lokr_w3", "hada_w1_a"])
def test_a_key_of_another_kind_is_refused_by_name(wrong, tmp_path):
    _, adapter = ours(tiny.mlp, {"targets": ["lin0"]})
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    from safetensors.torch import save_file

    save_file({**tensors, f"base_model.model.lin0.{wrong}": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=wrong):
        lk.Adapter.load(tmp_path)
