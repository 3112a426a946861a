"""What PEFT would drop of an adapter for a mixture of experts is named; the rest loads with the same logits."""

from __future__ import annotations

import warnings

import peft
import pytest
import tiny
import torch
from architectures import MOE, causal_lm

import lorakit as lk
from lorakit.errors import AdapterError, LorakitWarning
from lorakit.export.export import export
from lorakit.formats.peft_experts import misread

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


def trained(architecture, **config):
    return tiny.randomise_factors(lk.attach(causal_lm(architecture), lk.LoraConfig(rank=2, **config)), size=0.5)


def off(architecture, model, folder) -> float:
    """How far PEFT's logits with the adapter in a folder are from the model's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(causal_lm(architecture), folder).eval()
    with torch.no_grad():
        return float((theirs(IDS).logits - model.eval()(IDS).logits).abs().max())


@pytest.mark.parametrize("architecture", MOE)
def test_what_is_not_named_loads_in_peft_with_the_same_logits(architecture, tmp_path):
    model = trained(architecture)
    adapter = lk.capture(model)
    dropped = misread(adapter)
    if dropped:
        with pytest.warns(LorakitWarning, match=rf"PEFT would drop {len(dropped)} of the adapter's \d+ updates"):
            adapter.save(tmp_path)
        assert "PEFT would drop" in str(lk.summary(model))
        with pytest.raises(AdapterError, match=r"peft does not accept(.|\n)*takes .* of this model for experts"):
            export(adapter, tmp_path / "out", "peft")
        # with the advice of the note
        model = trained(architecture, exclude=sorted({m.rsplit(".", 1)[-1] for m in dropped}))
        adapter = lk.capture(model)
        assert not misread(adapter)
        assert "PEFT would drop" not in str(lk.summary(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorakitWarning)
        adapter.save(tmp_path / "ours")
    assert off(architecture, model, tmp_path / "ours") < 1e-3


@pytest.mark.parametrize("architecture", ["deepseek_v3", "qwen3_next", "glm4_moe"])
def test_dense_and_shared_layers_are_the_ones_named(architecture):
    named = misread(lk.capture(trained(architecture)))
    assert named
    assert all(".mlp." in m and ".experts." not in m for m in named)


def test_other_kinds_and_other_models_are_not_named(tiny_llama, tmp_path):
    assert not misread(lk.capture(trained("deepseek_v3", variant="loha")))
    assert not misread(lk.capture(tiny.randomise_factors(lk.attach(tiny_llama, lk.LoraConfig(rank=2)))))
    adapter = lk.capture(trained("deepseek_v3"))
    assert not misread(lk.Adapter(adapter.config, adapter.updates))  # it does not say what its base is
