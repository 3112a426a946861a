"""Trained tokens merged into files: existing rows, rows for new tokens, tied embeddings, the tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_lm
import torch
import transformers

import lorakit as lk
from lorakit.adapter.tokens import Tokens
from lorakit.bases.vocabulary import grow
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, TargetError


@pytest.fixture(params=["untied", "tied"])
def base(request, tmp_path):
    return tiny_lm.save(tmp_path / "base", tiny_lm.llama(tied=request.param == "tied"))


def trained(base, ids, rows: int | None = None, **settings):
    """A model with an adapter whose values are random, and its logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if rows:
        grow(model, rows)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=ids, **settings))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 2, 30, 5, 257]])).logits


def test_existing_rows_are_written_and_tied_ones_stay_tied(base, tmp_path):
    model = trained(base, [5, 9, 40])
    lk.capture(model).save(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == json.loads((base / "config.json").read_text())["tie_word_embeddings"]


def test_new_tokens_get_rows_and_the_tokenizer_learns_them(base, tmp_path):
    ids = {"input_embeddings": [258, 260], "output_embeddings": [258, 260]}
    model = trained(base, ids, rows=261)
    adapter = lk.capture(model)
    adapter.metadata["added_tokens"] = {"<A>": 258, "<B>": 259, "<C>": 260}
    adapter.save(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == 261
    assert merged.get_output_embeddings().weight.shape[0] == 261
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a<C><A>").input_ids[-2:] == [260, 258]


def test_an_output_layer_that_would_be_left_without_rows_is_refused(tmp_path):
    base = tiny_lm.save(tmp_path / "base")
    adapter = lk.capture(trained(base, [258], rows=259))
    with pytest.raises(AdapterError, match=r"no rows of them for its output layer 'lm_head\.weight'"):
        merge_checkpoint(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_two_adapters_with_tokens_of_one_embedding_add_up_as_live(base, tmp_path):
    first, second = lk.capture(trained(base, [5, 9])), lk.capture(trained(base, [5, 30]))
    assert any(isinstance(update, Tokens) for update in first.updates.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    for name, adapter in (("first", first), ("second", second)):
        lk.attach(model, adapter, name)
    lk.activate(model, {"first": 1.0, "second": 1.0})
    if model.config.tie_word_embeddings:
        with pytest.raises(TargetError, match=r"is one weight with 'lm_head\.weight'"):
            merge_checkpoint(base, [first, second], tmp_path / "merged")
        return
    merge_checkpoint(base, [first, second], tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)


def test_an_adapter_that_has_the_rows_of_a_tied_weight_twice_keeps_it_tied(tmp_path):
    """As PEFT writes them on a base that was resized."""
    base = tiny_lm.save(tmp_path / "base", tiny_lm.llama(tied=True))
    model = trained(base, [5, 9])
    adapter = lk.capture(model)
    rows = adapter.updates["model.embed_tokens"]
    twice = replace(adapter, updates={**adapter.updates, "lm_head": replace(rows, weight=rows.weight.clone())})
    merge_checkpoint(base, twice, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)
