"""How virtual tokens start: as tokens in front of a row, with what the model itself computes for these as the judge."""

from __future__ import annotations

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.errors import ConfigError

ROW = torch.tensor([[5, 9, 3, 7], [4, 4, 8, 2]])
TEXT = [6, 11, 30]


def in_front(model, ids: list[int]) -> torch.Tensor:
    front = torch.tensor(ids).expand(len(ROW), -1)
    return model(input_ids=torch.cat([front, ROW], 1)).logits[:, len(ids) :]


def gemma():
    """Gemma 3, whose embedding multiplies its rows by √width."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=tiny.VOCAB, num_key_value_heads=1, max_position_embeddings=32, sliding_window=32, **sizes
        )
    ).eval()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, gemma])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize(
    "n, used", [(3, TEXT), (2, TEXT[:2]), (7, [*TEXT, *TEXT, TEXT[0]])], ids=["its length", "cut", "repeated"]
)
def test_started_from_a_text_they_are_that_text(kind, make, n, used):
    wanted = in_front(make(), used)
    model = lk.attach(make(), lk.LoraConfig(variant=kind, virtual_tokens=n, prompt_text=TEXT))
    torch.testing.assert_close(model(input_ids=ROW).logits, wanted, atol=1e-6, rtol=0)
    assert not model.training


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_by_default_they_are_tokens_of_the_vocabulary(kind):
    torch.manual_seed(7)
    ids = torch.randint(tiny.VOCAB, (4,)).tolist()
    torch.manual_seed(7)
    model = tiny.llama()
    torch.manual_seed(7)
    lk.attach(model, lk.LoraConfig(variant=kind, virtual_tokens=4))
    torch.testing.assert_close(model(input_ids=ROW).logits, in_front(tiny.llama(), ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_random_start_is_of_standard_normal_vectors(kind):
    model = lk.attach(tiny.llama(), lk.LoraConfig(variant=kind, virtual_tokens=400, prompt_start="random"))
    values = model.model.lora_default.embeddings.detach()
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05


def test_texts_that_are_no_ids_of_the_base_are_refused():
    for text, match in (("Classify:", r"tokenizer\(text\)"), ([5, 48], "48 is not one of the base's 48")):
        with pytest.raises(ConfigError, match=match):
            lk.attach(tiny.llama(), lk.LoraConfig(variant="prompt", prompt_text=text))


def test_the_start_leaves_the_model_and_the_random_numbers_of_its_dropout_alone():
    model = tiny.llama().train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lk.attach(model, lk.LoraConfig(variant="prefix", virtual_tokens=3, prompt_text=TEXT))
    assert model.training
    assert model.model.layers[0].training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"variant": "prefix", "prompt_encoder": "lstm"}, "none of prefix's"),
        ({"variant": "prompt", "prompt_encoder": "mlp"}, "none of prompt's"),
        ({"variant": "p_tuning", "prompt_encoder": "none"}, "none of p_tuning's"),
        ({"variant": "prompt", "encoder_size": 8}, "prompt_encoder is none"),
        ({"variant": "p_tuning", "encoder_layers": 3}, "encoder_layers has an effect with prompt_encoder='lstm' only"),
        ({"variant": "prefix", "encoder_dropout": 0.1}, "encoder_dropout has an effect"),
        ({"variant": "p_tuning", "prompt_text": [1]}, "prompt_text is the start of virtual tokens without an encoder"),
        ({"variant": "prompt", "prompt_text": ""}, "prompt_text is empty"),
        ({"variant": "prompt", "prompt_text": [1], "prompt_start": "random"}, "both a start"),
        ({"variant": "prefix", "prompt": "prompt"}, "give one of them"),
        (
            {"virtual_tokens": 5},
            r"has an effect with virtual tokens \(variant, prompt or method prefix, prompt, p_tuning",
        ),
        ({"variant": "prefx"}, "did you mean 'prefix'"),
        ({"variant": "prefix", "virtual_tokens": 0}, "virtual_tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(given, match):
    with pytest.raises(ConfigError, match=match):
        lk.LoraConfig(**given)
