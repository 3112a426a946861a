"""PEFT's VeRA folder, both ways, with the real PEFT as the judge; the same start from a seed; gradients."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.vera import Projection, Vera
from lorakit.errors import AdapterError
from lorakit.formats import losses
from lorakit.formats.peft import CONFIG, WEIGHTS

TIGHT = {"atol": 2e-5, "rtol": 1e-5}
CASES = {
    "llama": (tiny.llama, {"targets": "all-linear", "task": "CAUSAL_LM"}),
    "one size, another seed": (tiny.llama, {"targets": ["q_proj"], "vera_seed": 3, "vera_start": 0.25}),
    "gpt2, stored transposed": (tiny.gpt2, {"targets": ["c_attn", "c_proj"]}),
    "bert, its head and biases saved": (
        tiny.bert,
        {"targets": ["query", "value"], "save_modules": ["classifier"], "task": "SEQ_CLS", "bias": "lora_only"},
    ),
}


def ours(make, settings) -> tuple[torch.nn.Module, lk.Adapter]:
    model = lk.attach(make(), lk.LoraConfig(**{"variant": "vera", "rank": 5, **settings}))
    tiny.randomise_factors(model, size=1.0)
    return model.eval(), lk.capture(model)


def theirs_of(make, settings, **fields):
    torch.manual_seed(1)
    config = peft.VeraConfig(
        r=5,
        target_modules=["q_proj", "up_proj", "down_proj"]
        if settings["targets"] == "all-linear"
        else settings["targets"],
        projection_prng_key=settings.get("vera_seed", 0),
        d_initial=settings.get("vera_start", 0.1),
        modules_to_save=settings.get("save_modules"),
        task_type=settings.get("task"),
        bias="vera_only" if "bias" in settings else "none",
        fan_in_fan_out=make is tiny.gpt2,
        **fields,
    )
    model = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".vera_lambda_" in name or (p.requires_grad and name.endswith("bias")):
                p.copy_(torch.randn(p.shape))
    return model


def loaded_in_peft(make, folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing
        return peft.PeftModel.from_pretrained(make(), folder, **more).eval()


@pytest.mark.parametrize("case", CASES)
def test_trained_here_it_gives_the_same_in_peft_and_comes_back_to_the_bit(case, tmp_path):
    make, settings = CASES[case]
    model, adapter = ours(make, settings)
    adapter.save(tmp_path)
    theirs = loaded_in_peft(make, tmp_path)
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), **TIGHT)
    assert (tiny.logits(theirs) - tiny.logits(make().eval())).abs().max() > 1e-3
    written = json.loads((tmp_path / CONFIG).read_text())
    assert set(written) <= {f.name for f in peft.VeraConfig.__dataclass_fields__.values()}
    back = lk.Adapter.load(tmp_path)
    assert back.config.vera_seed == settings.get("vera_seed", 0)
    assert {m: u.sizes for m, u in back.updates.items()} == {m: u.sizes for m, u in adapter.updates.items()}
    assert torch.equal(tiny.logits(lk.attach(make(), back).eval()), tiny.logits(model))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_trained_in_peft_it_gives_the_same_here_and_comes_back_the_same(case, saved, tmp_path):
    make, settings = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matrices that are not saved
        theirs = theirs_of(make, settings, save_projection=saved)
        theirs.save_pretrained(tmp_path / "theirs")
    adapter = lk.Adapter.load(tmp_path / "theirs")
    assert {type(u) for u in adapter.updates.values()} == {Vera}
    assert adapter.config.variant == "vera"
    model = lk.attach(make(), adapter).eval()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(theirs), **TIGHT)
    for value, folder in ((adapter, "unread"), (lk.capture(model), "again")):  # sizes and matrices unknown, and known
        value.save(tmp_path / folder)
        first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", folder))
        assert second.keys() - first.keys() == (
            {"base_model.vera_A", "base_model.vera_B"} if folder == "again" and not saved else set()
        )
        assert all(torch.equal(t, second[key]) for key, t in first.items())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = peft.PeftModel.from_pretrained(make(), tmp_path / folder).eval()
        torch.testing.assert_close(tiny.logits(again), tiny.logits(theirs), **TIGHT)


def test_its_gradients_are_those_of_peft(tmp_path):
    _, adapter = ours(tiny.llama, CASES["llama"][1])
    adapter.save(tmp_path)
    theirs = loaded_in_peft(tiny.llama, tmp_path, is_trainable=True).double()
    model = lk.attach(tiny.llama(dtype=torch.float64), adapter, trainable=True).eval()
    for each in (model, theirs):
        each(**tiny.example(model)).logits.square().sum().backward()
    mine = {n.replace(".lora_default.", "."): p.grad for n, p in model.named_parameters() if ".lora_default." in n}
    found = 0
    for name, p in theirs.named_parameters():
        if ".vera_lambda_" in name:
            own = mine[name.removeprefix("base_model.model.").removesuffix(".default").replace("vera_lambda_", "")]
            torch.testing.assert_close(own, p.grad, atol=1e-9, rtol=1e-9)
            found += 1
    assert found == len(mine) > 0


def test_peft_draws_the_same_matrices_and_starts_as_we_do():
    model = lk.attach(tiny.llama(), lk.LoraConfig(variant="vera", rank=4, targets=["q_proj", "down_proj"], vera_seed=7))
    value = next(iter(lk.capture(model).updates.values()))
    config = peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"], projection_prng_key=7)
    theirs = peft.get_peft_model(tiny.llama(), config).base_model
    assert torch.equal(value.projection.A, theirs.vera_A["default"])
    assert torch.equal(value.projection.B, theirs.vera_B["default"])
    layer = theirs.model.model.layers[0].self_attn.q_proj
    assert torch.equal(value.d, layer.vera_lambda_d["default"])
    assert torch.equal(value.b, layer.vera_lambda_b["default"])


def test_what_the_folder_cannot_hold_is_listed(tmp_path):
    d, b = torch.ones(2), torch.ones(4)
    updates = {name: Vera(d, b, Projection.drawn(seed, 2, 4, 4), 4) for seed, name in enumerate("ab")}
    mixed = lk.Adapter(lk.LoraConfig(targets=["a", "b"]), updates)
    assert "share" in "\n".join(losses(mixed, "peft"))
    with pytest.raises(AdapterError, match="random matrices"):
        mixed.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD = {
    "without its matrices": (lambda t: t.pop("base_model.vera_A"), "base_model.vera_A"),
    "without a vector": (lambda t: t.pop("base_model.model.lin0.vera_lambda_d"), "no vera_lambda_d"),
    "a key of LoRA": (lambda t: t.update({"base_model.model.lin0.lora_A.weight": torch.ones(2, 2)}), "lora_A"),
    "a vector too long": (lambda t: t.update({"base_model.model.lin0.vera_lambda_b": torch.ones(999)}), "do not fit"),
    "a rank that differs": (lambda t: t.update({"base_model.model.lin0.vera_lambda_d": torch.ones(9)}), "do not fit"),
    "not finite": (lambda t: t["base_model.model.lin0.vera_lambda_b"].fill_(float("nan")), "not finite"),
    "matrices not finite": (lambda t: t["base_model.vera_A"].fill_(float("inf")), "not finite"),
    "a matrix for a vector": (lambda t: t.update({"base_model.model.lin0.vera_lambda_d": torch.ones(5, 1)}), "vectors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_by_name(case, tmp_path):
    damage, said = BAD[case]
    _, adapter = ours(tiny.mlp, {"targets": ["lin0"]})
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(tmp_path)


def test_a_model_that_is_too_wide_for_its_matrices_is_refused(tmp_path):
    theirs = theirs_of(tiny.mlp, {"targets": ["lin0"]})
    theirs.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    wide = torch.nn.Sequential()
    wide.lin0 = torch.nn.Linear(10_000, adapter.updates["lin0"].b.shape[0])
    with pytest.raises(AdapterError, match=r"at most \d+ inputs; it has"):
        lk.attach(wide, adapter)
