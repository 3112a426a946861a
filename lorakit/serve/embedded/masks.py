"""Attention masks for rows that stand at different positions, one for each kind of layer.

    seen[n, 0, q, k] = k <= position[n, q]                                      full attention
                       and k > position[n, q] - window                          with a sliding window

A prompt's tokens that start at position 0 in every row need no mask of ours: causality is enough, as what is padded
stands on the right, and attention without a mask is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

Kinds = dict[str, int | None]  # kind of layer, as the model's config names it -> its window
# How the masks of these implementations are given: whether a position is seen, or what is added to its score.
BOOLEAN, ADDED = "sdpa", "eager"


def kinds_of(model: Any) -> Kinds | None:
    """Return the kinds of the model's layers; None if a layer caches or sees anything but all keys, or a window."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    windows = [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers]
    names = getattr(config, "layer_types", None)
    if names is None:
        names = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if len(names) != len(windows) or not set(names) <= {"full_attention", "sliding_attention"}:
        return None  # chunked attention, or layers that share keys
    kinds = dict(zip(names, windows, strict=True))
    return kinds if [kinds[name] for name in names] == windows else None


def masks(kinds: Kinds, positions: Tensor, end: int, how: str, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Return the mask for tokens at `positions`, [rows, width], over keys 0 to `end`: [rows, 1, width, end].

    A model with several kinds of layer gets one for each. how: BOOLEAN, or ADDED in `dtype`.
    """
    columns = torch.arange(end, device=positions.device)
    own = positions[:, None, :, None]
    causal = columns <= own
    made = {}
    for kind, window in kinds.items():
        seen = causal if window is None or window >= end else causal & (columns > own - window)
        if how == ADDED:
            made[kind] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, torch.finfo(dtype).min
            )
        else:
            made[kind] = seen
    return made if len(made) > 1 else next(iter(made.values()))
