"""Streamed and generated text is the same for every architecture, whatever its cache is and is called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from architectures import CONFIGS, causal_lm, greedy
from torch import nn

from lorakit.generate.decode import cache_name, step
from lorakit.generate.generate import generate, stream

PROMPTS = [[5, 9, 11, 40, 3], [7], [8, 8, 30]]


class Numbers:
    """A tokenizer whose text is the ids."""

    eos_token_id = None
    pad_token_id = 0

    def decode(self, ids, **_):
        return "".join(f"{i} " for i in ids)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_streamed_and_generated_text_takes_the_most_likely_token_each_step(architecture):
    model, numbers = causal_lm(architecture), Numbers()
    expected = [numbers.decode(greedy(model, prompt, 8)) for prompt in PROMPTS]
    assert ["".join(stream(model, numbers, prompt, max_new_tokens=8)) for prompt in PROMPTS] == expected
    assert generate(model, numbers, PROMPTS, max_new_tokens=8, batch_size=1) == expected


class Counting(nn.Module):
    """A model whose next token is the number of tokens it has seen, if it is given all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: SimpleNamespace())
        self.device = torch.device("cpu")
        self.given: list[dict] = []

    def logits(self, ids, **given):
        self.given.append({"tokens": ids.shape[1], **given})
        return torch.nn.functional.one_hot(torch.full(ids.shape, ids.shape[1]), 50).float()


class OwnName(Counting):
    """Keeps a state under a name of its own, and swallows every other name."""

    def forward(self, input_ids, memory=None, **kwargs):
        return SimpleNamespace(logits=self.logits(input_ids, **kwargs), cache="a state", past_key_values="a state")


class OldName(Counting):
    """Remote code with transformers' old name."""

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        logits = self.logits(input_ids, past_key_values=past_key_values)
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + input_ids.shape[1])


def test_a_cache_is_handed_on_only_under_a_name_that_forward_has():
    model = OwnName()
    assert cache_name(model) is None
    text = "".join(stream(model, Numbers(), [3, 4], max_new_tokens=3))
    assert text == "2 3 4 ", "every step must be given all tokens"
    assert [given["tokens"] for given in model.given] == [2, 3, 4]
    assert all("cache" not in given and "past_key_values" not in given for given in model.given)


def test_the_old_name_of_the_cache_works_with_any_release():
    model = OldName()
    assert cache_name(model) == "past_key_values"
    _, cache = step(model, torch.tensor([[3, 4]]), None)
    step(model, torch.tensor([[5]]), cache)
    assert model.given == [{"tokens": 2, "past_key_values": None}, {"tokens": 1, "past_key_values": 2}]
