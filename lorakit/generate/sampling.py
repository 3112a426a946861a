"""The next token from logits: the likeliest one, or a draw from the nucleus (Holtzman et al. 2020).

The nucleus is softmax(logits / temperature), cut to the smallest set of likeliest tokens whose sum reaches top_p.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pick = Callable[[Tensor], Tensor]  # logits, [rows, vocab], to tokens, [rows]


def picker(temperature: float, top_p: float, source: torch.Generator | None = None) -> Pick:
    """Greedy at temperature 0. Draws come from `source`, or from torch's global random stream."""
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    return lambda logits: torch.multinomial(nucleus(logits / temperature, top_p), 1, generator=source)[:, 0]


def random_source(device: torch.device, seed: int | None) -> torch.Generator:
    """A random stream of its own; without a seed, another one each time."""
    source = torch.Generator(device)
    if seed is None:
        source.seed()
    else:
        source.manual_seed(seed)
    return source


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Probabilities, [..., vocab], zero outside the smallest set of likeliest tokens whose sum reaches top_p."""
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens hold; 0 for the likeliest, which always stays
    kept = probabilities.masked_fill(before >= top_p, 0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))
