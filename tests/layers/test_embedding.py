"""Adapted embeddings: rows of W + ΔW, dropout, padding, and embeddings that are not plain tables."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import lorakit as lk
from lorakit.errors import TargetError


def adapted(layer: nn.Module, **config) -> nn.Module:
    model = nn.Sequential(layer)
    lk.attach(model, lk.LoraConfig(**{"rank": 3, "alpha": 6, "targets": ["0"]} | config))
    return tiny.randomise_factors(model)


def full(model: nn.Sequential) -> torch.Tensor:
    """W + ΔW in float64, from the captured value."""
    f = lk.capture(model).factors["0"]
    return model[0].weight.detach().double() + f.scale * (f.B.double() @ f.A.double()).T


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)], ids=str)
def test_the_output_is_rows_of_the_updated_table(shape):
    model, ids = adapted(nn.Embedding(11, 5)), torch.randint(0, 11, shape)
    torch.testing.assert_close(model(ids).double(), full(model)[ids], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_updated_table():
    model, ids = adapted(nn.Embedding(11, 5, dtype=torch.float64)), torch.tensor([[1, 1, 4], [0, 9, 1]])
    A, B = model[0].lora_default.A, model[0].lora_default.B
    ours = torch.autograd.grad(model(ids).square().sum(), [A, B])
    theirs = torch.autograd.grad((model[0].weight + 2 * (B @ A).T)[ids].square().sum(), [A, B])
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)
    assert not ours[0][:, [2, 3, 5, 6, 7, 8, 10]].any(), "rows that were not looked up do not change"


def test_a_fresh_adapter_changes_nothing_and_can_learn():
    model, ids = nn.Sequential(nn.Embedding(11, 5)), torch.tensor([1, 4])
    before = model(ids)
    lk.attach(model, lk.LoraConfig(rank=3, targets=["0"]))
    assert torch.equal(model(ids), before)
    model(ids).sum().backward()
    assert model[0].lora_default.A.grad.any()


def test_the_padding_row_takes_no_gradient():
    model = adapted(nn.Embedding(11, 5, padding_idx=2))
    model(torch.tensor([2, 3])).square().sum().backward()
    assert not model[0].lora_default.A.grad[:, 2].any()
    assert model[0].lora_default.A.grad[:, 3].any()


def test_dropout_on_an_embedding_is_applied_in_training():
    model, ids = adapted(nn.Embedding(11, 5), dropout=0.5), torch.arange(11)
    assert not torch.equal(model.train()(ids), model(ids))
    f = model[0].lora_default
    torch.manual_seed(4)
    ours = model(ids)
    torch.manual_seed(4)
    torch.testing.assert_close(ours, model[0].weight[ids] + 2 * F.dropout(f.A.T[ids], 0.5, True) @ f.B.T)
    torch.testing.assert_close(model.eval()(ids).double(), full(model)[ids], atol=1e-5, rtol=1e-5)


def test_a_bf16_embedding_gives_bf16():
    model, ids = adapted(nn.Embedding(11, 5, dtype=torch.bfloat16)), torch.arange(11)
    assert model(ids).dtype == torch.bfloat16
    torch.testing.assert_close(model(ids).double(), full(model)[ids], atol=0.05, rtol=0.02)


def test_merging_gives_the_updated_table_and_back():
    model, ids = adapted(nn.Embedding(11, 5)), torch.arange(11)
    base, expected = tiny.bits(model), full(model)
    lk.merge(model)
    torch.testing.assert_close(model(ids).double(), expected, atol=1e-6, rtol=1e-6)
    lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), base)


def test_an_embedding_that_scales_its_output_scales_the_update_too():
    """Gemma's: the update belongs to the weight, so merged and unmerged must agree."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    model, ids = adapted(Gemma3TextScaledWordEmbedding(11, 5, padding_idx=0, embed_scale=3.0)), torch.arange(11)
    before = model(ids)
    torch.testing.assert_close(before.double(), 3 * full(model)[ids], atol=1e-4, rtol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=1e-5)


def test_an_embedding_that_makes_its_own_indices_is_refused():
    """OPT's positions are given a mask, not ids: an update looked up by the mask would be wrong in silence."""
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    with pytest.raises(TargetError, match="OPTLearnedPositionalEmbedding, which has no low-rank update"):
        lk.attach(nn.Sequential(OPTLearnedPositionalEmbedding(11, 5)), lk.LoraConfig(targets=["0"]))


def test_a_tied_model_with_an_adapted_embedding_keeps_its_head_and_refuses_to_merge(tied_llama):
    lk.attach(tied_llama, lk.LoraConfig(rank=2, targets=["embed_tokens"]))
    tiny.randomise_factors(tied_llama)
    f = lk.capture(tied_llama).factors["model.embed_tokens"]
    untied = tiny.llama(tied=True)
    # the head keeps the old one
    untied.model.embed_tokens.weight = nn.Parameter(untied.model.embed_tokens.weight + f.delta())
    torch.testing.assert_close(tiny.logits(tied_llama), tiny.logits(untied), atol=1e-5, rtol=1e-5)
    with pytest.raises(lk.LorakitError, match=r"'model\.embed_tokens' shares its weight with lm_head"):
        lk.merge(tied_llama)


def test_both_ends_of_a_tied_weight_have_updates_of_their_own(tied_llama):
    lk.attach(tied_llama, lk.LoraConfig(rank=2, targets=["embed_tokens", "lm_head"]))
    tiny.randomise_factors(tied_llama)
    value = lk.capture(tied_llama)
    untied = tiny.llama(tied=True)
    weight = untied.lm_head.weight.detach()
    untied.model.embed_tokens.weight = nn.Parameter(weight + value.factors["model.embed_tokens"].delta())
    untied.lm_head.weight = nn.Parameter(weight + value.factors["lm_head"].delta())
    torch.testing.assert_close(tiny.logits(tied_llama), tiny.logits(untied), atol=1e-5, rtol=1e-5)
    tied_llama(**tiny.example(tied_llama)).logits.square().sum().backward()
    trained = [p for p in tied_llama.parameters() if p.requires_grad]
    assert len({id(p) for p in trained}) == len(trained) == 4
