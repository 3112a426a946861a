"""Textual inversion: only the new rows are trained, and they come back as an adapter's embeddings."""

from __future__ import annotations

import pytest
import tiny_pipelines as tiny
import torch
from tiny_families import FAMILIES

import lorakit as lk
from lorakit.adapter.tokens import Tokens
from lorakit.bases.pipeline import as_module
from lorakit.errors import ConfigError, TrainError
from lorakit.tasks.image.loss import losses
from lorakit.tasks.image.prompts import encode_prompts, text_prompts
from lorakit.tasks.image.settings import DiffusionSettings
from lorakit.tasks.image.tokens import NewToken, add_tokens, bundled, trainable_tokens

NEW = {"<toy>": NewToken(2, "a cat"), "<blob>": NewToken()}
MAKE = {"sd1": tiny.tiny_sd1, "sdxl": tiny.tiny_sdxl}


def trained(name: str):
    """A pipeline with tokens and a LoRA of its UNet after three steps; what was added; the embeddings before."""
    torch.manual_seed(0)
    pipe = MAKE[name]()
    before = {c: getattr(pipe, c).get_input_embeddings().weight.clone() for c in pipe.components if "text_enc" in c}
    added = add_tokens(pipe, NEW)
    start = {c: getattr(pipe, c).get_input_embeddings().weight.clone() for c in before}
    config = lk.LoraConfig(rank=2, targets=["to_q"], trainable_tokens=trainable_tokens(pipe, added))
    lk.attach(pipe, config)
    optimizer = torch.optim.AdamW([p for p in as_module(pipe).parameters() if p.requires_grad], lr=1e-2)
    latents = torch.randn(2, 4, 8, 8)
    for _ in range(3):
        prompts = text_prompts(["a photo of <toy>", "<toy> on a <blob>"])
        losses(as_module(pipe), latents, prompts, DiffusionSettings()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return pipe, added, before, start


@pytest.mark.parametrize("name", MAKE)
def test_only_the_new_rows_are_trained(name):
    pipe, added, before, start = trained(name)
    adapter = lk.capture(pipe)
    tokens = {module: update for module, update in adapter.updates.items() if isinstance(update, Tokens)}
    assert set(tokens) == {f"{c}.text_model.embeddings.token_embedding" for c in before}
    for component, ids in added.ids.items():
        update = tokens[f"{component}.text_model.embeddings.token_embedding"]
        flat = [i for own in ids.values() for i in own]
        assert list(update.ids) == sorted(flat)
        assert ((update.weight - start[component][list(update.ids)]).abs().amax(1) > 1e-4).all()
        live = getattr(pipe, component).get_input_embeddings().weight
        assert torch.equal(live[: len(before[component])], before[component])
        assert torch.equal(live, start[component])
    assert any("to_q" in module for module in adapter.updates)


def test_tokens_begin_as_their_initializer():
    pipe = tiny.tiny_sd1()
    words = pipe.tokenizer("a cat", add_special_tokens=False).input_ids
    added = add_tokens(pipe, {"<toy>": NewToken(3, "a cat"), "<blob>": NewToken(2)})
    rows = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows[list(added.ids["text_encoder"]["<toy>"])], rows[[words[0], words[1], words[0]]])
    blob = rows[list(added.ids["text_encoder"]["<blob>"])]
    assert not torch.equal(blob[0], blob[1])
    assert pipe.tokenizer("<toy> <toy>_1", add_special_tokens=False).input_ids == list(
        added.ids["text_encoder"]["<toy>"][:2]
    )


@pytest.mark.parametrize("name", MAKE)
def test_embeddings_in_an_adapter_do_in_a_fresh_pipeline_what_the_trained_rows_did(name, tmp_path):
    pipe, added, _, _ = trained(name)
    adapter = bundled(lk.capture(pipe), pipe, added)
    parts = ["<toy>", "<blob>"] if name == "sd1" else [f"{t}.clip_{p}" for t in ("<toy>", "<blob>") for p in "lg"]
    assert {key: list(v.shape) for key, v in adapter.embeddings.items()} == {
        key: [2 if key.startswith("<toy>") else 1, tiny.WIDTH] for key in parts
    }
    assert not any(isinstance(update, Tokens) for update in adapter.updates.values())
    fresh = MAKE[name]()
    lk.attach(fresh, adapter)
    caption = ["<toy> on a <blob>"]
    ours, theirs = encode_prompts(pipe, caption)[0], encode_prompts(fresh, caption)[0]
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=0)


def test_real_diffusers_reads_the_vectors():
    pipe, added, _, _ = trained("sd1")
    adapter = bundled(lk.capture(pipe), pipe, added)
    fresh = tiny.tiny_sd1()
    for token, vectors in adapter.embeddings.items():
        fresh.load_textual_inversion({token: vectors}, token=token)
    caption = ["<toy> on a <blob>"]
    ours, theirs = encode_prompts(pipe, caption)[0], encode_prompts(fresh, caption)[0]
    torch.testing.assert_close(ours["prompt_embeds"], theirs["prompt_embeds"], atol=1e-6, rtol=0)


def test_a_language_model_learns_tokens_where_there_is_no_clip():
    assert set(add_tokens(FAMILIES["z_image"]().pipe, {"<toy>": NewToken()}).ids) == {"text_encoder"}
    assert set(add_tokens(FAMILIES["flux"]().pipe, {"<toy>": NewToken()}).ids) == {"text_encoder"}


def test_bad_tokens_leave_the_pipeline_alone():
    pipe = tiny.tiny_sd1()
    size, rows = len(pipe.tokenizer), pipe.text_encoder.get_input_embeddings().weight.shape
    with pytest.raises(ConfigError, match="cat</w> is in the vocabulary"):
        add_tokens(pipe, {"<toy>": NewToken(), "cat</w>": NewToken()})
    with pytest.raises(ConfigError, match="is empty or has spaces"):
        add_tokens(pipe, {"my toy": NewToken()})
    with pytest.raises(ConfigError, match="0 vectors"):
        add_tokens(pipe, {"<toy>": NewToken(0)})
    with pytest.raises(ConfigError, match="initializer of token '<toy>' is empty"):
        add_tokens(pipe, {"<toy>": NewToken(1, "")})
    assert (len(pipe.tokenizer), pipe.text_encoder.get_input_embeddings().weight.shape) == (size, rows)
    with pytest.raises(TrainError, match="no text encoder with a tokenizer"):
        add_tokens(FAMILIES["wan"]().pipe, {"<toy>": NewToken()})
