"""Textual-inversion embeddings of an adapter on a pipeline, compared with diffusers' own `load_textual_inversion`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import WIDTH, draw, tiny_sd1, tiny_sdxl

import lorakit as lk
from lorakit.bases.pipeline import as_module
from lorakit.errors import AdapterError, StateError

PROMPT = "a red <cat> style"


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def with_tokens(pipe, **tokens: torch.Tensor) -> lk.Adapter:
    """An adapter of the UNet (ΔW = 0) with embeddings. `tokens`: word in angle brackets -> vectors."""
    lk.attach(pipe, lk.LoraConfig(rank=2, targets="attention"))
    adapter = lk.capture(pipe)
    lk.detach(pipe)
    return replace(adapter, embeddings={f"<{word}>": rows for word, rows in tokens.items()})


@pytest.mark.parametrize("n", [1, 3])
def test_a_token_means_what_it_means_in_diffusers(n):
    theirs, ours = tiny_sd1(), tiny_sd1()
    theirs.load_textual_inversion({"<cat>": vectors(n)}, token="<cat>")
    lk.attach(ours, with_tokens(ours, cat=vectors(n)))
    assert torch.equal(draw(ours, PROMPT), draw(theirs, PROMPT))
    assert not torch.equal(draw(ours, PROMPT), draw(tiny_sd1(), PROMPT))
    one = replace(with_tokens(tiny_sd1()), embeddings={"<cat>": vectors(1)[0]})  # [dim] is one vector
    lk.detach(ours)
    lk.attach(ours, one)
    assert len(ours.tokenizer) == len(tiny_sd1().tokenizer) + 1


def test_detach_takes_the_tokens_away_again():
    pipe = tiny_sd1()
    tokenizer, embedding = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    weight, before, size = embedding.weight, draw(pipe, PROMPT), len(pipe.tokenizer)
    values = weight.detach().clone()
    lk.attach(pipe, with_tokens(pipe, cat=vectors(2)))
    assert pipe.text_encoder.config.vocab_size == embedding.num_embeddings == len(pipe.tokenizer) == size + 2
    assert not embedding.weight.requires_grad
    captured = lk.capture(pipe)
    assert torch.equal(captured.embeddings["<cat>"], vectors(2))
    lk.detach(pipe)
    assert pipe.tokenizer is tokenizer
    assert embedding.weight is weight
    assert torch.equal(weight, values)
    assert weight.requires_grad
    assert pipe.text_encoder.config.vocab_size == embedding.num_embeddings == len(tokenizer) == size
    assert torch.equal(draw(pipe, PROMPT), before)


def test_two_adapters_with_tokens_come_and_go_in_any_order():
    pipe, alone = tiny_sd1(), tiny_sd1()
    lk.attach(pipe, with_tokens(pipe, cat=vectors(2)), "a")
    lk.attach(pipe, with_tokens(alone, dog=vectors(1, seed=1)), "b")
    lk.attach(alone, with_tokens(tiny_sd1(), dog=vectors(1, seed=1)))
    with pytest.raises(StateError, match="token '<dog>' is in the vocabulary of the pipeline's text_encoder already"):
        lk.attach(pipe, with_tokens(tiny_sd1(), dog=vectors(1)), "c")
    assert lk.adapters(pipe) == ["a", "b"]
    lk.detach(pipe, "a")
    assert torch.equal(draw(pipe, "a <dog>"), draw(alone, "a <dog>"))
    lk.detach(pipe)
    assert torch.equal(draw(pipe, "a <dog>"), draw(tiny_sd1(), "a <dog>"))


def test_a_text_encoder_with_tokens_is_still_the_base_of_other_adapters():
    pipe = tiny_sd1()
    lk.attach(pipe, lk.LoraConfig(rank=2, components=["text_encoder"]), "words")
    words = lk.capture(pipe)
    lk.detach(pipe)
    lk.attach(pipe, with_tokens(pipe, cat=vectors(2)), "token")
    lk.attach(pipe, words, "words")
    lk.attach(pipe, lk.LoraConfig(rank=2, components=["text_encoder"]), "new")
    assert lk.capture(pipe, "new").metadata["fingerprint"] == words.metadata["fingerprint"]


def test_a_text_encoder_with_tokens_cannot_be_replaced():
    pipe = tiny_sd1()
    lk.attach(pipe, with_tokens(pipe, cat=vectors(2)))
    encoder, pipe.text_encoder = pipe.text_encoder, tiny_sd1(seed=1).text_encoder
    with pytest.raises(StateError, match="the pipeline's text_encoder was replaced"):
        lk.detach(pipe)
    pipe.text_encoder = encoder
    lk.detach(pipe)


def test_an_adapter_of_a_text_encoder_that_had_the_tokens_fits_one_without_them():
    trained = tiny_sd1()
    trained.tokenizer.add_tokens(["<cat>", "<cat>_1"])
    trained.text_encoder.resize_token_embeddings(len(trained.tokenizer), mean_resizing=False)
    lk.attach(trained, lk.LoraConfig(rank=2, targets="attention", components=["text_encoder"]))
    adapter = lk.capture(trained)
    with pytest.raises(AdapterError, match="another base"):
        lk.attach(tiny_sd1(), adapter)
    lk.attach(tiny_sd1(), replace(adapter, embeddings={"<cat>": vectors(2)}))
    with pytest.raises(AdapterError, match="another base"):
        lk.attach(tiny_sd1(seed=1), replace(adapter, embeddings={"<cat>": vectors(2)}))


def test_sdxl_has_a_vector_for_each_text_encoder():
    theirs, ours = tiny_sdxl(), tiny_sdxl()
    theirs.load_textual_inversion({"<cat>": vectors(2)}, token="<cat>")
    second = {"text_encoder": theirs.text_encoder_2, "tokenizer": theirs.tokenizer_2}
    theirs.load_textual_inversion({"<cat>": vectors(2, seed=1)}, token="<cat>", **second)
    as_module(theirs).requires_grad_(False)  # torch's own matmul rounds otherwise where weights require gradients
    adapter = replace(with_tokens(ours), embeddings={"<cat>.clip_l": vectors(2), "<cat>.clip_g": vectors(2, seed=1)})
    lk.attach(ours, adapter)
    assert torch.equal(draw(ours, PROMPT), draw(theirs, PROMPT))
    assert lk.capture(ours).embeddings.keys() == adapter.embeddings.keys()


def test_embeddings_alone_are_an_adapter():
    pipe = tiny_sd1()
    lk.attach(pipe, lk.Adapter(lk.LoraConfig(), {}, embeddings={"<cat>": vectors(1)}))
    assert "<cat>" in pipe.tokenizer.get_vocab()
    lk.detach(pipe)


def test_what_cannot_take_embeddings_is_said():
    adapter = with_tokens(tiny_sd1(), cat=vectors(2))
    bare = tiny_sd1().unet
    with pytest.raises(AdapterError, match="'<cat>': it needs a pipeline"):
        lk.attach(bare, adapter)
    assert lk.adapters(bare) == []
    lk.attach(bare, adapter, strict=False)
    assert "embedding '<cat>'" in lk.summary(bare).skipped
    wide = replace(adapter, embeddings={"<cat>": torch.zeros(1, 768)})
    with pytest.raises(AdapterError, match=r"no text encoder takes vectors of 768 elements .*'text_encoder': 12"):
        lk.attach(tiny_sd1(), wide)
    known = replace(adapter, embeddings={"cat</w>": vectors(1)})
    with pytest.raises(StateError, match="in the vocabulary"):
        lk.attach(tiny_sd1(), known)
    adapted = tiny_sd1()
    lk.attach(adapted, lk.LoraConfig(rank=2, targets=["token_embedding"], components=["text_encoder"]))
    with pytest.raises(StateError, match="token embedding of the pipeline's text_encoder is adapted"):
        lk.attach(adapted, adapter, "b")


def test_a_merged_pipeline_keeps_its_tokens():
    pipe = tiny_sd1()
    lk.attach(pipe, with_tokens(pipe, cat=vectors(2)))
    ours = draw(pipe, PROMPT)
    lk.merge(pipe)
    lk.detach(pipe, merged="keep")
    assert torch.equal(draw(pipe, PROMPT), ours)
