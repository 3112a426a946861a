"""Pick the next token from logits: greedy, or nucleus sampling (Holtzman et al. 2020).

The nucleus is softmax(logits / temperature), truncated to the smallest set of most likely tokens whose probabilities
add up to at least top_p, and renormalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pick = Callable[[Tensor], Tensor]  # logits [rows, vocab] -> token ids [rows]


def picker(temperature: float, top_p: float, source: torch.Generator | None = None) -> Pick:
    """Return a function that picks tokens: greedy at temperature 0, else nucleus sampling.

    source: the random generator to draw from; None is torch's global one.
    """
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    return lambda logits: torch.multinomial(nucleus(logits / temperature, top_p), 1, generator=source)[:, 0]


def random_source(device: torch.device, seed: int | None) -> torch.Generator:
    """Return a new random generator, seeded with `seed`, or nondeterministically without one."""
    source = torch.Generator(device)
    if seed is None:
        source.seed()
    else:
        source.manual_seed(seed)
    return source


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return the nucleus's probabilities, [..., vocab]: zero outside it, renormalised inside."""
    kept = in_nucleus(logits.softmax(-1), top_p)
    return kept / kept.sum(-1, keepdim=True)


def in_nucleus(weights: Tensor, top_p: float | Tensor) -> Tensor:
    """Return the weights with zeros outside of each row's nucleus. The likeliest token always stays.

    weights: [..., vocab], probabilities up to a factor. top_p: one, or one for each row, [..., 1].
    """
    values, order = weights.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # the mass of all likelier tokens
    outside = before >= weights.sum(-1, keepdim=True) * top_p
    outside[..., 0] = False  # even with top_p 0
    return torch.zeros_like(weights).scatter_(-1, order, values.masked_fill_(outside, 0.0))
