"""Leave out unlikely tokens before a draw: min_p, top_k, then top_p, each where a row asks for it.

min_p (Nguyen et al. 2024): tokens less likely than min_p times the likeliest one. top_k (Fan et al. 2018): all but the
k likeliest, and what ties with the last of them. top_p (Holtzman et al. 2020): all but the smallest set of likeliest
tokens whose probabilities, of those that are left, add up to at least top_p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..engine import Sampling

# A nucleus is looked for among this many likeliest tokens first; only rows whose nucleus is larger are sorted.
HEAD = 128

_Value = TypeVar("_Value", int, float)


def keep_likely(weights: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Return `weights` with zeros for what is left out. weights: [rows, vocab], the likeliest of each row 1."""
    vocab = weights.shape[-1]
    min_p = [one.min_p for one in settings]
    if any(min_p):
        weights = weights.masked_fill(weights < weights.new_tensor(min_p)[:, None], 0.0)
    weights = _on_rows(weights, [one.top_k if one.top_k < vocab else 0 for one in settings], 0, _top_k)
    return _on_rows(weights, [one.top_p for one in settings], 1.0, _top_p)


def _on_rows(
    weights: Tensor, values: Sequence[_Value], off: _Value, keep: Callable[[Tensor, Sequence[_Value]], Tensor]
) -> Tensor:
    """Apply `keep` to the rows whose value is not `off`."""
    rows = [at for at, value in enumerate(values) if value != off]
    if len(rows) == len(values):
        return keep(weights, values)
    if not rows:
        return weights
    index = torch.tensor(rows, device=weights.device)
    return weights.index_copy(0, index, keep(weights[index], [values[at] for at in rows]))


def _top_k(weights: Tensor, top_k: Sequence[int]) -> Tensor:
    likeliest = weights.topk(max(top_k)).values  # [rows, largest k]
    least = likeliest.gather(1, torch.tensor(top_k, device=weights.device)[:, None] - 1)  # [rows, 1]
    return weights.masked_fill(weights < least, 0.0)


def _top_p(weights: Tensor, top_p: Sequence[float]) -> Tensor:
    mass = weights.sum(-1, keepdim=True) * weights.new_tensor(top_p)[:, None]  # [rows, 1]
    vocab = weights.shape[-1]
    values, order = weights.topk(min(HEAD, vocab))
    inside = _nucleus(values, mass)
    kept = torch.zeros_like(weights).scatter(-1, order, inside)
    larger = inside[:, -1] > 0  # even the last of the head is in the nucleus, so more of them may be
    if vocab > HEAD and larger.any():
        values, order = weights[larger].sort(dim=-1, descending=True)
        kept[larger] = torch.zeros_like(values).scatter(-1, order, _nucleus(values, mass[larger]))
    return kept


def _nucleus(values: Tensor, mass: Tensor) -> Tensor:
    """Return `values`, sorted from the largest, with zeros where those before add up to `mass` already."""
    before = values.cumsum(-1) - values
    outside = before >= mass
    outside[:, 0] = False  # the likeliest token stays, even with top_p 0
    return values.masked_fill(outside, 0.0)
