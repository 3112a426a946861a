"""Which models the embedded engine takes, and the masks and slots that it gives them."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from architectures import causal_lm
from transformers import LlamaForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.serve.embedded.batches import Batches
from lorakit.serve.embedded.masks import ADDED, BOOLEAN, kinds_of, masks
from lorakit.serve.embedded.request import Request
from lorakit.serve.embedded.runner import Runner
from lorakit.serve.embedded.slots import Slots
from lorakit.serve.engine import Sampling, Work


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "lfm2", "qwen3_next"])
def test_models_that_cache_more_than_keys_of_a_row_are_refused_by_name(architecture):
    model = causal_lm(architecture)
    with pytest.raises(LorakitError, match=rf"{type(model).__name__} cannot be served.*(.|\n)*--engine vllm"):
        Runner(model)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(LorakitError, match="T5ForConditionalGeneration"):
        Runner(tiny.t5())


def test_an_attention_without_masks_of_its_own_is_refused_with_the_setting_to_use():
    model = tiny.llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(LorakitError, match=r"flash_attention_2(.|\n)*attn_implementation='sdpa'"):
        Runner(model)


class Unmasked(LlamaForCausalLM):
    """Accepts a mask, and does not use it."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, logits_to_keep=0
    ):
        return super().forward(
            input_ids, position_ids=position_ids, cache=cache, use_cache=use_cache, logits_to_keep=logits_to_keep
        )


class Positionless(LlamaForCausalLM):
    """Fails on a mask for each row."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, logits_to_keep=0
    ):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("two axes, please")
        return super().forward(
            input_ids, position_ids=position_ids, cache=cache, use_cache=use_cache, logits_to_keep=logits_to_keep
        )


@pytest.mark.parametrize(
    ("kind", "says"), [(Unmasked, "other logits than each alone"), (Positionless, "two axes, please")]
)
def test_a_model_that_takes_masks_otherwise_is_found_out_at_the_start(kind, says):
    torch.manual_seed(0)
    with pytest.raises(LorakitError, match=f"{kind.__name__} cannot be served.*{says}"):
        Runner(kind(tiny.llama().config))


def test_a_base_with_virtual_tokens_is_refused():
    model = tiny.llama()
    lk.attach(model, lk.LoraConfig(variant="prefix", virtual_tokens=2))
    with pytest.raises(LorakitError, match=r"virtual tokens(.|\n)*detach"):
        Runner(model)


def test_the_context_is_the_models_at_most():
    assert Runner(tiny.llama()).context == 32
    assert Runner(tiny.llama(), 20).context == 20
    assert Runner(tiny.llama(), 1000).context == 32


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss", "mistral"])
@pytest.mark.parametrize(("past", "width"), [(0, 7), (5, 3), (9, 1)])
def test_masks_of_equal_rows_are_those_of_transformers(architecture, past, width):
    model = causal_lm(architecture)
    kinds = kinds_of(model)
    model.config._attn_implementation = how = "eager"
    positions = (torch.arange(width) + past).expand(2, -1)
    made = masks(kinds, positions, past + width, how, torch.float32)
    made = made if isinstance(made, dict) else {next(iter(kinds)): made}
    cache = Slots(2, 2, 32)
    cache.lengths = [past, past]
    given = {
        "config": model.config,
        "inputs_embeds": torch.zeros(2, width, 8),
        "attention_mask": torch.ones(2, past + width, dtype=torch.long),
        "cache": cache.cache,
        "position_ids": positions,
    }
    for kind, mask in made.items():
        theirs = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
        expected = theirs(**given, allow_is_causal_skip=False)
        assert torch.equal(mask, expected.expand_as(mask))


def test_masks_of_rows_at_different_positions():
    positions = torch.tensor([[4], [1], [7]])
    made = masks({"full_attention": None, "sliding_attention": 3}, positions, 8, BOOLEAN, torch.float32)
    for row, (at,) in enumerate(positions.tolist()):
        assert made["full_attention"][row, 0, 0].nonzero()[:, 0].tolist() == list(range(at + 1))
        assert made["sliding_attention"][row, 0, 0].nonzero()[:, 0].tolist() == list(range(max(0, at - 2), at + 1))
    added = masks({"sliding_attention": 3}, positions, 8, ADDED, torch.bfloat16)
    assert torch.equal(added == 0, made["sliding_attention"])
    assert added.dtype == torch.bfloat16
    assert added.isfinite().all()


def test_slots_hold_each_rows_own_values_whatever_comes_and_goes():
    draw, made = random.Random(0), torch.Generator().manual_seed(0)
    slots, layers, heads = Slots(2, 12, 400), 2, 3
    expected: dict[Request, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def values(length):
        return [
            (
                torch.randn(heads, length, 4, generator=made),
                torch.randn(heads, length, 5, generator=made),  # values of another size, as in MLA
            )
            for _ in range(layers)
        ]

    for _ in range(400):
        what = draw.random()
        if what < 0.25 and len(slots.rows) < 12:
            request, length = Request(Work((1,), (), Sampling(1)), ()), draw.choice([0, 1, 5, 40])
            expected[request] = values(length)
            slots.append(request, values(0) if not length else expected[request], length)
        elif what < 0.35 and slots.rows:
            at = draw.randrange(len(slots.rows))
            del expected[slots.rows[at]]
            slots.remove(at)
        elif slots.rows and slots.longest < 390:
            width = draw.choice([1, 1, 3])
            slots.begin(width)
            new = [values(width) for _ in slots.rows]
            for number, layer in enumerate(slots.layers):
                keys, own = layer.update(*(torch.stack([v[number][side] for v in new]) for side in (0, 1)))
                assert keys.shape == (len(slots.rows), heads, slots.longest, 4)
                assert keys.isfinite().all()
                assert own.isfinite().all()
            slots.end()
            for request, values_of in zip(slots.rows, new, strict=True):
                expected[request] = [
                    (torch.cat((k, a), 1), torch.cat((v, b), 1))
                    for (k, v), (a, b) in zip(expected[request], values_of, strict=True)
                ]
        for at, request in enumerate(slots.rows):
            length = slots.lengths[at]
            assert length == expected[request][0][0].shape[1]
            if length:
                for (k, v), (a, b) in zip(slots.read(at, length), expected[request], strict=True):
                    assert torch.equal(k, a)
                    assert torch.equal(v, b)


def test_a_row_of_one_token_beyond_the_buffers_takes_the_place_of_one_that_moves(monkeypatch):
    """Its prompt has nothing to be computed before the first step, so nothing has made room for it."""
    monkeypatch.setattr("lorakit.serve.embedded.batches.FIRST_LENGTH", 8)
    monkeypatch.setattr("lorakit.serve.embedded.batches.CALL_BYTES", -(1 << 60))  # batches are not joined
    batches = Batches(Runner(tiny.llama()), 8)
    rows = [Request(Work((1,) * 8, (), Sampling(9)), ()) for _ in range(4)]
    values = [(torch.full((1, 7, 8), 1.0 + layer), torch.full((1, 7, 8), 2.0 + layer)) for layer in range(2)]
    for request in rows:
        batches.add(request, values)
    short = Request(Work((1,), (), Sampling(9)), ())
    batches.add(short, None)
    rows[0].ids.append(3)  # it outgrows its class
    batches.of[0].lengths[0] = 8
    batches.arrange()
    first, second = batches.of
    assert (first.rows, first.lengths) == ([short, *rows[1:]], [0, 7, 7, 7])
    assert (second.rows, second.lengths) == ([rows[0]], [8])
    for (keys, own), (a, b) in zip(first.read(2, 7), values, strict=True):
        assert torch.equal(keys, a)
        assert torch.equal(own, b)


def longrope():
    config = tiny.llama().config
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        **factors,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_model_whose_frequencies_depend_on_the_longest_row_is_served_as_far_as_they_do_not(caplog):
    model = longrope()
    positions = torch.arange(30)[None]
    with torch.no_grad():  # what makes it so: a longer row beside it changes what a row of 8 tokens is given
        given = [model.model.rotary_emb(torch.ones(1), positions[:, :n])[0][0, :8] for n in (8, 30)]
    assert not torch.equal(*given)
    assert Runner(model).context == 16
    assert "served with a context of 16" in caplog.text
    assert Runner(model, 12).context == 12
    with pytest.raises(LorakitError, match=r"LongRoPE(.|\n)*--context 16, or with --engine vllm"):
        Runner(model, 17)
