"""The tokens that virtual tokens start as: random ones of the vocabulary, or those of a text.

Lester et al. (2021, section 3.2) found the vocabulary's embeddings a better start than noise for prompt tuning, Li &
Liang (2021, section 7.4) the keys and values of real words for prefix tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...config import LoraConfig
from ...errors import ConfigError
from ..bases import base_of
from ..init.batches import undisturbed
from ..layer import LoraLayer
from .body import BodyLayer


def start_ids(layer: BodyLayer, config: LoraConfig) -> Tensor | None:
    """Return the ids of n tokens, [n]; None for a start at random. A text is repeated or cut to n tokens, as PEFT does.

    Raises ConfigError for a text that is no list of ids, and for ids beyond the vocabulary.
    """
    n, text = config.virtual_tokens, config.prompt_text
    vocabulary = base_of(layer.lora_embedding()).shape(layer.lora_embedding())[0]
    if isinstance(text, str):
        raise ConfigError(
            f"prompt_text: {text!r} is no list of token ids, and there is no tokenizer here to make one\n"
            "  give ids: tokenizer(text)['input_ids']"
        )
    if text is None:
        return torch.randint(vocabulary, (n,)) if config.prompt_start == "vocabulary" else None
    beyond = [token for token in text if not 0 <= token < vocabulary]
    if beyond:
        raise ConfigError(f"prompt_text: the token id {beyond[0]} is not one of the base's {vocabulary:,}")
    return torch.tensor((list(text) * math.ceil(n / len(text)))[:n])


@contextmanager
def base_alone(module: nn.Module) -> Iterator[None]:
    """Compute as the base does, without the adapters that are active: in eval mode and without gradients."""
    active = [(layer, layer.lora_active) for layer in module.modules() if isinstance(layer, LoraLayer)]
    try:
        for layer, _ in active:
            layer.lora_active = ()
        with undisturbed(module), torch.no_grad():
            yield
    finally:
        for layer, own in active:
            layer.lora_active = own
