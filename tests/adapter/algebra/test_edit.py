"""Scaling, negating, casting, pruning and renaming: new values, compared by their ΔW."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_adapters import adapter, deltas, exact, factors, numbers

import lorakit as lk
from lorakit.adapter.algebra.edit import cast, negate, prune, rename, scale, select
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError, ConfigError, TargetError


@pytest.mark.parametrize("weight", [0.3, -2.0, 0.0, 1.0, 1])
def test_every_kind_of_update_scales(weight):
    value = adapter(others=True)
    scaled = weight * value
    scaled.check()
    for m, W in deltas(scaled).items():
        torch.testing.assert_close(W, weight * exact(value.updates[m]), rtol=1e-6, atol=1e-6)
        if m in scaled.factors and weight not in (0, 1):
            assert scaled.config.alpha_of(m) == pytest.approx(scaled.factors[m].alpha)


def test_scaling_and_negating_change_no_number():
    value = adapter()
    half, undone = value * 0.1, -value
    for m, f in value.factors.items():
        assert half.factors[m].A is f.A
        assert half.factors[m].B is f.B
        assert torch.equal(undone.factors[m].B, -f.B)
        assert undone.factors[m].alpha == f.alpha


def test_an_adapter_and_its_negation_are_nothing():
    value = adapter(others=True)
    assert all(float(W.abs().max()) < 1e-5 for W in deltas(value + negate(value)).values())
    assert all(float(W.abs().max()) < 1e-5 for W in deltas(value - value).values())


def test_what_cannot_be_scaled_says_so():
    whole = replace(adapter(), saved={"head.weight": numbers(2, 3)})
    with pytest.raises(AdapterError, match=r"has saved weights \(head\.weight\)"):
        0.5 * whole
    assert 1.0 * whole is whole
    with pytest.raises(AdapterError, match="'q' is a DoRA"):
        scale(lk.Adapter(lk.LoraConfig(), {"q": Dora(factors(), torch.ones(12, 1))}), 2.0)
    with pytest.raises(ConfigError, match="scaled by nan"):
        scale(adapter(), float("nan"))
    with pytest.raises(TypeError):
        adapter() * "2"
    with pytest.raises(TypeError):
        adapter() + 1


def test_cast_refuses_what_does_not_fit():
    value = adapter()
    assert {f.A.dtype for f in cast(value, torch.float16).factors.values()} == {torch.float16}
    big = lk.Adapter(lk.LoraConfig(), {"q": lk.Factors(numbers(2, 3) * 1e6, numbers(3, 2), 1.0)})
    with pytest.raises(AdapterError, match=r"'q', A: values up to .* are too large for float16"):
        cast(big, torch.float16)
    assert cast(big, torch.bfloat16)


def test_prune_and_select_are_each_others_rest():
    value = replace(adapter(others=True), saved={"head.weight": numbers(2, 3), "layers.0.q.bias": numbers(12)})
    without, only = prune(value, ["q", "embed"]), select(value, ["q", "embed"])
    assert set(without.updates) | set(only.updates) == set(value.updates)
    assert not set(without.updates) & set(only.updates)
    assert set(only.updates) == {"layers.0.q", "layers.1.q", "embed"}
    assert (set(without.saved), set(only.saved)) == ({"head.weight"}, {"layers.0.q.bias"})
    assert set(select(value, r"layers\.1\..*").updates) == {m for m in value.updates if m.startswith("layers.1.")}
    assert only.config.targets == ["embed", "q"]
    assert only.config.rank_of("layers.1.q") == 5
    assert not only.config.packed
    assert value.prune(["q", "embed"]).updates.keys() == without.updates.keys()
    assert value.select(["q", "embed"]).updates.keys() == only.updates.keys()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"variant": "ia3", "targets": "ia3", "save_modules": ["norm"]}, "lora"),
        ({"variant": "bottleneck", "activation": "gelu", "rank": 4, "save_modules": ["norm"]}, "lora"),
        ({"variant": "adalora", "adalora_rank": 2, "rank": 4, "save_modules": ["norm"]}, "lora"),
        ({"variant": "bottleneck", "activation": "gelu", "rank": 4, "trainable_tokens": [1, 2]}, "tokens"),
        ({"variant": "prompt", "virtual_tokens": 2, "trainable_tokens": [1, 2]}, "prompt"),
        ({"rank": 4, "prompt": "prompt", "virtual_tokens": 2, "trainable_tokens": [1, 2]}, "tokens"),
    ],
)
def test_without_the_updates_of_its_kind_the_settings_of_the_kind_are_gone_too(settings, kept, tiny_llama):
    value = lk.capture(lk.attach(tiny_llama, lk.LoraConfig(**settings)))
    rest = select(value, r"model\.(norm|embed_tokens)|base_model")
    assert (rest.config.variant, rest.config.activation, rest.config.feedforward) == (kept, "relu", None)


def test_beside_tokens_an_adapter_stays_of_its_kind(tiny_llama):
    settings = {"variant": "bottleneck", "targets": "houlsby", "activation": "gelu", "rank": 4}
    value = lk.capture(lk.attach(tiny_llama, lk.LoraConfig(**settings, trainable_tokens=[1, 2])))
    rest = prune(value, ["o_proj"])
    assert (rest.config.variant, rest.config.activation) == ("bottleneck", "gelu")
    assert prune(value, ["embed_tokens"]).config.variant == "bottleneck"


def test_a_pattern_that_names_nothing_is_an_error():
    with pytest.raises(TargetError, match="no module of this adapter matches 'qvk'; did you mean 'qkv'"):
        prune(adapter(), ["q", "qvk"])
    with pytest.raises(TargetError, match="nothing would be left"):
        prune(adapter(), ".*")


def test_rename_by_whole_names_and_by_beginnings():
    value = replace(adapter(), saved={"layers.0.norm.weight": numbers(9)})
    new = rename(value, {"layers": "model.blocks", "layers.0.conv": "stem", "embed": "wte"})
    assert set(new.factors) == {
        "model.blocks.0.q",
        "model.blocks.1.q",
        "stem",
        "wte",
        "model.blocks.0.c_fc",
        "model.blocks.0.qkv",
        "model.blocks.1.r",
    }
    assert set(new.saved) == {"model.blocks.0.norm.weight"}
    assert new.config.rank_of("model.blocks.1.q") == 5
    assert new.factors["stem"] is value.factors["layers.0.conv"]
    there_and_back = rename(rename(value, {"": "unet"}), {"unet": ""})
    assert there_and_back.factors == dict(value.factors)
    assert value.rename({"": "unet"}).rename({"unet": ""}).factors == dict(value.factors)
    assert rename(value, {"layers.0": "x"}).factors.keys() >= {"x.q", "layers.1.q"}


def test_a_renaming_that_collides_or_fits_nothing_is_refused():
    with pytest.raises(AdapterError, match=r"'layers\.1\.q' would be named 'layers\.0\.q', the name of 'layers\.0\.q'"):
        rename(adapter(), {"layers.1": "layers.0"})
    with pytest.raises(TargetError, match="no module's name is or starts with 'layer'"):
        rename(adapter(), {"layer": "x"})
    with pytest.raises(AdapterError, match="an empty name"):
        rename(adapter(), {"embed": ""})
