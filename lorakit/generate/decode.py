"""Decode a batch step by step (`Decoder`), or compute the next token's logits once (`step`).

    decoder = Decoder(model, prompts, pad, max_new_tokens=80)   # prefill
    decoder.logits                                              # [rows, vocab], for each row's next token
    decoder.keep(active)                                        # drop finished rows
    decoder.step(tokens)                                        # feed one token per remaining row

transformers' `generate` computes every row until the longest one ends, and copies the entire key-value cache in each
step to append one position. Here a finished row leaves the batch, and keys and values are written into a preallocated
buffer. The tokens are the same. Models that `supports` rules out are left to transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerationMixin

# transformers 5.24 renamed `past_key_values` to `cache`, as an argument and in the output. Remote code may still use
# the old name with a new release.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(model: Any) -> str | None:
    """Return the argument under which the model's forward takes its cache; None if it takes none by a known name.

    A forward that ends in `**kwargs` accepts any name without using it, so only its own parameters count.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def step(model: Any, ids: Tensor, cache: Any, **inputs: Any) -> tuple[Tensor, Any]:
    """Run the model on `ids`, [rows, tokens]. Return the last logits, [rows, vocab] in float32, and the cache.

    cache: None lets the model create its own. The returned one is None if the model has none that it would take in the
    next step: then all tokens must be fed again. inputs: more of the model's own.
    """
    parameters, name = inspect.signature(model.forward).parameters, cache_name(model)
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    if name is not None:
        options |= {name: cache, "use_cache": True}
    elif "use_cache" in parameters:
        options["use_cache"] = False
    out = model(input_ids=ids, **options, **inputs)
    return out.logits[:, -1].float(), None if name is None else getattr(out, name, None)


def supports(model: Any) -> bool:
    """Whether `Decoder` can decode this model.

    It must be decoder-only, use transformers' default input preparation, and cache nothing but keys and values, by row
    (no recurrent states).
    """
    cls: Any = type(model)
    if not issubclass(cls, GenerationMixin) or model.config.is_encoder_decoder:
        return False
    parameters = inspect.signature(model.forward).parameters
    return (
        cls.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and {"attention_mask", "position_ids"} <= parameters.keys()
        and cache_name(model) is not None
        and preallocated_cache(model, 1) is not None
    )


def preallocated_cache(model: Any, capacity: int) -> Cache | None:
    """Return an empty cache with `capacity` positions; None if the model caches more than keys and values."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):
    """A cache layer with buffers of `capacity` positions; `keys` and `values` are views of the filled part."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, [rows, heads, new positions, head_dim], and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._buffers or end > self.capacity:
            self._enlarge((key_states, value_states), start, max(end, self.capacity))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        return self._set_views(len(key_states), end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in place: only rows that move are copied."""
        if not self._buffers:
            return
        end = self.get_seq_length()
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for buffer in self._buffers:
            buffer[moved, :, :end] = buffer[indices[moved], :, :end]
        self._set_views(len(indices), end)

    def _enlarge(self, like: tuple[Tensor, Tensor], start: int, capacity: int) -> None:
        """Allocate buffers of `capacity` positions, or twice that when they grow, and copy the first `start` over."""
        self.capacity = capacity if not self._buffers else 2 * capacity
        old = self._buffers
        self._buffers = tuple(new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in like)
        for buffer, before in zip(self._buffers, old, strict=False):  # `old` is empty the first time
            buffer[:, :, :start] = before[:, :, :start]

    def _set_views(self, rows: int, end: int) -> tuple[Tensor, Tensor]:
        self._buffers = tuple(buffer[:rows] for buffer in self._buffers)
        keys, values = (buffer[:, :, :end] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


class Decoder:
    """A batch being decoded, with its key-value cache. Prompts are left-padded, so next tokens share a column."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int, max_new_tokens: int):
        self.model = model
        ids, mask = pad_rows(prompts, pad, on_left=True)  # [rows, longest]
        self.length = ids.shape[1]
        mask_with_new = torch.nn.functional.pad(mask, (0, max_new_tokens), value=1)
        self.mask = mask_with_new.to(model.device)  # [rows, longest + max_new_tokens]
        positions = (mask.cumsum(1) - 1).clamp_min(0).to(model.device)
        self.positions = positions[:, -1:]  # [rows, 1]
        cache = preallocated_cache(model, self.length + max_new_tokens - 1)  # the last token is not fed
        assert cache is not None, "the caller asks `supports` first"
        self.cache = cache
        self.logits = self._read(ids.to(model.device), positions)

    def step(self, tokens: Tensor) -> None:
        """Feed one token per row, [rows]."""
        self.length += 1
        self.positions = self.positions + 1
        self.logits = self._read(tokens[:, None], self.positions)

    def keep(self, active: Sequence[bool]) -> list[int]:
        """Drop inactive rows; the last rows fill the gaps. Return the old index of each remaining row."""
        kept = [row for row, is_active in enumerate(active) if is_active]
        fill = [row for row in kept if row >= len(kept)]
        order = [row if active[row] else fill.pop() for row in range(len(kept))]
        index = torch.tensor(order, device=self.model.device)
        self.cache.batch_select_indices(index)
        self.mask, self.positions, self.logits = self.mask[index], self.positions[index], self.logits[index]
        return order

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask = self.mask[:, : self.length]
        # Without padding no mask is needed, and attention is faster without one.
        logits, _ = step(
            self.model, ids, self.cache, attention_mask=None if mask.all() else mask, position_ids=positions
        )
        return logits


def pad_rows(rows: Sequence[Sequence[int]], pad: int, on_left: bool) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest. Return ids and attention mask, both [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if on_left else slice(0, len(row))
        ids[index, columns] = torch.tensor(list(row))
        mask[index, columns] = 1
    return ids, mask
