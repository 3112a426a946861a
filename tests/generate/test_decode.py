"""The decoding loop gives the tokens of transformers' `generate` with less work, for the models it supports."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM
from transformers.cache_utils import DynamicLayer

from lorakit.generate.decode import Decoder, PreallocatedLayer, pad_rows, supports
from lorakit.generate.generate import generate, stream

TEXTS = ["a", "The cat", "hello there, you", "x" * 30, "café", "b", "The dog", "c"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture
def mistral(tokenizer):
    """A Mistral whose window of 8 positions is far shorter than the prompts."""
    torch.manual_seed(4)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        intermediate_size=48,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.3,
        **SIZES,
        **HEADS,
    )
    return MistralForCausalLM(config).float()


@pytest.fixture
def opt(tokenizer):
    torch.manual_seed(5)
    config = OPTConfig(vocab_size=len(tokenizer), ffn_dim=48, word_embed_proj_dim=32, init_std=0.3, **SIZES, **HEADS)
    return OPTForCausalLM(config).float()


@pytest.fixture
def mamba(tokenizer):
    torch.manual_seed(6)
    return MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), state_size=4, initializer_range=0.3, **SIZES)
    ).float()


def by_transformers(model, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The new ids of each prompt, up to the end token."""
    ids, mask = pad_rows(prompts, 0, on_left=True)
    settings = model.generation_config
    settings.eos_token_id = settings.eos_token_id or 1
    output = model.eval().generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    rows = output[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def ending_early(model, prompts) -> None:
    """Make frequent tokens end the text, so that rows end at different steps."""
    rows = by_transformers(model, prompts, 20)
    model.generation_config.eos_token_id = sorted(
        {1, *(row[3 * i % len(row)] for i, row in enumerate(rows[:5]) if row)}
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt"])
def test_rows_that_end_at_different_steps_equal_transformers(family, request, tokenizer, prompts):
    model = request.getfixturevalue(family)
    assert supports(model)
    ending_early(model, prompts)
    expected = by_transformers(model, prompts, 20)
    assert len({len(row) for row in expected}) > 2, "rows must end at different steps for this test to mean something"
    texts = generate(model, tokenizer, prompts, max_new_tokens=20)
    assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_is_the_same_with_every_attention_implementation(attention, llama, tokenizer, prompts):
    llama.set_attn_implementation(attention)
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in by_transformers(llama, prompts, 12)]
    assert generate(llama, tokenizer, prompts, max_new_tokens=12) == expected


def test_finished_rows_are_not_computed(llama, tokenizer, prompts):
    ending_early(llama, prompts)
    rows: list[int] = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generate(llama, tokenizer, prompts, max_new_tokens=20)
    hook.remove()
    lengths = [len(row) for row in by_transformers(llama, prompts, 20)]
    assert rows == [sum(length >= step for length in lengths) for step in range(min(max(lengths) + 1, 20))]


def test_no_mask_is_passed_without_padding(llama, tokenizer):
    masks = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    generate(llama, tokenizer, [[5, 6, 7], [8, 9, 10]], max_new_tokens=3)
    assert masks == [None, None, None]
    generate(llama, tokenizer, [[5, 6, 7], [8, 9]], max_new_tokens=3)
    hook.remove()
    assert masks[-1].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("family", ["t5", "mamba"])
def test_other_models_are_left_to_transformers(family, request, tokenizer, prompts):
    model = request.getfixturevalue(family)
    assert not supports(model)
    texts = generate(model, tokenizer, prompts, max_new_tokens=8)
    if family == "mamba":
        assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in by_transformers(model, prompts, 8)]
    assert ["".join(stream(model, tokenizer, prompt, max_new_tokens=8)) for prompt in prompts] == texts


def test_a_model_that_prepares_its_own_inputs_is_left_to_transformers(llama):
    class Own(type(llama)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    assert supports(llama)
    llama.__class__ = Own
    assert not supports(llama)


def test_keep_fills_gaps_with_the_last_rows(llama, prompts):
    decoder = Decoder(llama.eval(), prompts[:5], 0, max_new_tokens=4)
    before = decoder.logits
    assert decoder.keep([True, False, True, False, True]) == [0, 4, 2]
    torch.testing.assert_close(decoder.logits, before[[0, 4, 2]], rtol=0, atol=0)
    decoder.step(torch.tensor([7, 8, 9]))
    for i, row in enumerate((0, 4, 2)):
        alone = llama(torch.tensor([[*prompts[row], 7 + i]])).logits[0, -1]
        torch.testing.assert_close(decoder.logits[i], alone, rtol=1e-4, atol=1e-4)


def test_preallocated_layer_equals_transformers_layer():
    """Also beyond its first capacity, and after rows have been dropped."""
    torch.manual_seed(0)
    ours, theirs = PreallocatedLayer(capacity=6), DynamicLayer()
    for step, new in enumerate((4, 1, 1, 1, 1, 5)):
        rows = 5 if step < 3 else 3
        keys, values = torch.randn(rows, 2, new, 3), torch.randn(rows, 2, new, 4)
        for our, their in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(our, their)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if step == 2:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([0, 4, 2]))
