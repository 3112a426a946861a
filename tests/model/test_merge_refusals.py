"""Merging what is tied, not finite or too large; and what goes on beside a merged adapter."""

from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.errors import StateError

TIED = lk.LoraConfig(rank=2, targets=["q_proj", "embed_tokens"])


def trained(model, config, name="default", seed=1):
    return tiny.randomise_factors(lk.attach(model, config, name), seed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("variant", ["lora", "loha"])
def test_factors_that_are_not_finite_are_not_merged(tiny_mlp, bad, variant):
    trained(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0", "lin1"], variant=variant))
    base = tiny.bits(tiny_mlp)
    with torch.no_grad():
        next(tiny_mlp.lin1.lora_default.parameters())[0, 0] = bad
    with pytest.raises(StateError, match=r"of 'lin1' has 1 NaN or infinite element, so it cannot be merged"):
        lk.merge(tiny_mlp)
    assert tiny.same_bits(tiny.bits(tiny_mlp), base)
    lk.activate(tiny_mlp, None)  # nothing is merged


def test_saved_weights_that_are_not_finite_are_not_merged(tiny_mlp):
    trained(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0"], save_modules=["head"]))
    base = tiny.bits(tiny_mlp)
    with torch.no_grad():
        tiny_mlp.head.weight[0, 0] = float("nan")
    with pytest.raises(StateError, match=r"'head.weight' of adapter 'default' has 1 NaN"):
        lk.merge(tiny_mlp)
    assert torch.equal(tiny_mlp.lin0.weight, base["lin0.weight"])


def test_an_update_beyond_the_precision_is_not_merged():
    """Finite factors whose product is infinite in float16, in one block of rows in the middle of the weight."""
    model = torch.nn.Sequential(torch.nn.Linear(3000, 2000, bias=False)).half()
    lk.attach(model, lk.LoraConfig(rank=1, alpha=1))
    with torch.no_grad():
        model[0].lora_default.A.fill_(300.0)
        model[0].lora_default.B.fill_(1e-3)
        model[0].lora_default.B[1500] = 300.0
    base = model[0].weight.detach().clone()
    with pytest.raises(StateError, match=r"make '0' infinite or NaN: ΔW reaches 9e\+04, and float16 ends at 6.55e\+04"):
        lk.merge(model)
    assert torch.equal(model[0].weight, base)


def test_a_tied_embedding_merges_once_it_is_untied_and_comes_back_tied(tied_llama):
    trained(tied_llama, TIED)
    base, adapted, weight = tiny.bits(tied_llama), tiny.logits(tied_llama), tied_llama.lm_head.weight
    with pytest.raises(StateError, match="untie=True"):
        lk.merge(tied_llama)
    lk.merge(tied_llama, untie=True)
    torch.testing.assert_close(tiny.logits(tied_llama), adapted, atol=1e-5, rtol=1e-5)
    assert tied_llama.lm_head.weight is weight
    assert tied_llama.model.embed_tokens.weight is not weight
    assert tied_llama.config.tie_word_embeddings is False
    lk.unmerge(tied_llama)
    assert tied_llama.model.embed_tokens.weight is weight
    assert tied_llama.config.tie_word_embeddings is True
    assert tiny.same_bits(tiny.bits(tied_llama), base)
    assert torch.equal(tiny.logits(tied_llama), adapted)


def test_both_ends_of_a_tied_weight_are_untied(tied_llama):
    trained(tied_llama, TIED.replace(targets=["embed_tokens", "lm_head"]))
    base, adapted = tiny.bits(tied_llama), tiny.logits(tied_llama)
    lk.merge(tied_llama, untie=True)
    torch.testing.assert_close(tiny.logits(tied_llama), adapted, atol=1e-5, rtol=1e-5)
    lk.detach(tied_llama, merged="undo")
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight
    assert tiny.same_bits(tiny.bits(tied_llama), base)


def test_an_untied_merged_model_is_saved_and_loaded_by_transformers(tied_llama, tmp_path):
    trained(tied_llama, TIED)
    adapted = tiny.logits(tied_llama)
    lk.merge(tied_llama, untie=True)
    lk.detach(tied_llama, merged="keep")
    tied_llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), adapted, atol=1e-5, rtol=1e-5)


def test_a_copy_of_an_untied_model_can_be_unmerged(tied_llama):
    trained(tied_llama, TIED)
    base = tiny.bits(tied_llama)
    lk.merge(tied_llama, untie=True)
    file = io.BytesIO()
    torch.save(tied_llama, file)
    file.seek(0)
    for twin in (copy.deepcopy(tied_llama), torch.load(file, weights_only=False)):
        lk.unmerge(twin)
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
        assert tiny.same_bits(tiny.bits(twin), base)


def test_untying_that_fails_leaves_the_weight_tied(tied_llama):
    trained(tied_llama, TIED)
    with torch.no_grad():
        tied_llama.model.layers[1].self_attn.q_proj.lora_default.A[0, 0] = float("nan")
    with pytest.raises(StateError, match="NaN"):
        lk.merge(tied_llama, untie=True)
    assert tied_llama.lm_head.weight is tied_llama.model.embed_tokens.weight
    assert tied_llama.config.tie_word_embeddings is True


@pytest.mark.parametrize("saves", [[], ["head"]])
def test_another_adapter_can_be_detached_while_one_is_merged(tiny_mlp, saves):
    trained(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0", "lin1"]), "other", 2)
    trained(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0"], save_modules=saves), "gone", 3)
    trained(tiny_mlp, lk.LoraConfig(rank=2, targets=["lin0", "lin1"]), "merged", 1)
    lk.activate(tiny_mlp, {"merged": 1.0, "other": 0.5})
    adapted = tiny.logits(tiny_mlp)
    lk.merge(tiny_mlp)
    merged = tiny.logits(tiny_mlp)
    lk.detach(tiny_mlp, "gone")
    assert lk.adapters(tiny_mlp) == ["other", "merged"]
    assert torch.equal(tiny.logits(tiny_mlp), merged)
    with pytest.raises(StateError, match=r"merged='keep'"):
        lk.detach(tiny_mlp, "other")
    lk.unmerge(tiny_mlp)
    assert torch.equal(tiny.logits(tiny_mlp), adapted)
    lk.detach(tiny_mlp)
    assert tiny.same_bits(tiny.bits(tiny_mlp), tiny.bits(tiny.mlp()))
