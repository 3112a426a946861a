"""The next token's logits (`step`), and a batch of rows that is decoded step by step (`Decoder`).

    decoder = Decoder(model, prompts, pad, most=80)     # reads the prompts
    decoder.logits                                      # [rows, vocab], of each row's next token
    decoder.keep(going)                                 # rows that have ended leave
    decoder.step(tokens)                                # one token more for each row that is left

transformers' `generate` computes every row until the longest one ends, and copies all keys and values in each step to make room for
one position more. Here a row leaves when it ends, and keys and values are written into room that was made beforehand. The tokens
are the same. `supports` says for which models: the others are left to transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed `past_key_values` to `cache`, as an argument and in what a model returns.
CACHE = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))


def step(model: Any, ids: Tensor, cache: Any, **more: Any) -> tuple[Tensor, Any]:
    """The last position's logits, [rows, vocab] in float32, and the cache, which a model may make itself (None: it has none)."""
    takes = inspect.signature(model.forward).parameters
    own = "past_key_values" if "past_key_values" in takes and CACHE not in takes else CACHE  # code from a hub may be older
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    out = model(input_ids=ids, use_cache=True, **{own: cache}, **only_last, **more)
    return out.logits[:, -1].float(), getattr(out, CACHE, None)


def supports(model: Any) -> bool:
    """Whether `Decoder` decodes this model: a decoder-only one that is prepared as transformers prepares most, and whose keys and
    values lie row by row (no recurrent states)."""
    kind: Any = type(model)
    if not issubclass(kind, GenerationMixin) or model.config.is_encoder_decoder:
        return False
    takes = inspect.signature(model.forward).parameters
    return (
        kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and {"attention_mask", "position_ids"} <= takes.keys()
        and not takes.keys().isdisjoint((CACHE, "past_key_values"))
        and roomy_cache(model, 1) is not None
    )


def roomy_cache(model: Any, room: int) -> Cache | None:
    """An empty cache with room for so many positions; None if the model's is not made of keys and values alone."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers that have room for more positions; `keys` and `values` are views of what is filled."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._buffers or end > self.room:
            self._enlarge((key_states, value_states), start, max(end, self.room))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        return self._show(len(key_states), end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. In place: only rows that change their place are copied."""
        if not self._buffers:
            return
        end = self.get_seq_length()
        places = torch.arange(len(indices), device=indices.device)
        moved = (indices != places).nonzero()[:, 0]
        for buffer in self._buffers:
            buffer[moved, :, :end] = buffer[indices[moved], :, :end]
        self._show(len(indices), end)

    def _enlarge(self, like: tuple[Tensor, Tensor], start: int, room: int) -> None:
        """Buffers of `room` positions that hold what was there. (Beyond the room asked for: twice as much.)"""
        self.room = room if not self._buffers else 2 * room
        old = self._buffers
        self._buffers = tuple(new.new_empty(*new.shape[:2], self.room, new.shape[3]) for new in like)
        for buffer, before in zip(self._buffers, old, strict=False):  # none before the first
            buffer[:, :, :start] = before[:, :, :start]

    def _show(self, rows: int, end: int) -> tuple[Tensor, Tensor]:
        self._buffers = tuple(buffer[:rows] for buffer in self._buffers)
        keys, values = (buffer[:, :, :end] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


class Decoder:
    """Rows of one batch with their keys and values. Prompts are padded on the left, so each row's next token is in the last column."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int, most: int):
        self.model = model
        ids, mask = pad_rows(prompts, pad, on_left=True)  # [rows, longest]
        self.length = ids.shape[1]
        self.mask = torch.nn.functional.pad(mask, (0, most), value=1).to(model.device)  # [rows, longest + most]
        positions = (mask.cumsum(1) - 1).clamp_min(0).to(model.device)
        self.positions = positions[:, -1:]  # [rows, 1]
        self.cache = roomy_cache(model, self.length + most - 1)  # the last token is not read
        self.logits = self._read(ids.to(model.device), positions)

    def step(self, tokens: Tensor) -> None:
        """One token for each row: [rows]."""
        self.length += 1
        self.positions = self.positions + 1
        self.logits = self._read(tokens[:, None], self.positions)

    def keep(self, going: Sequence[bool]) -> list[int]:
        """Drop the rows that do not go on. Which row is in which place now: the last ones fill the gaps."""
        places = [place for place, on in enumerate(going) if on]
        fill = [place for place in places if place >= len(places)]
        now = [place if going[place] else fill.pop() for place in range(len(places))]
        index = torch.tensor(now, device=self.model.device)
        self.cache.batch_select_indices(index)  # type: ignore[union-attr]
        self.mask, self.positions, self.logits = self.mask[index], self.positions[index], self.logits[index]
        return now

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask = self.mask[:, : self.length]
        # Without padding no mask is needed, and attention is faster without.
        logits, _ = step(self.model, ids, self.cache, attention_mask=None if mask.all() else mask, position_ids=positions)
        return logits


def pad_rows(rows: Sequence[Sequence[int]], pad: int, on_left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if on_left else slice(0, len(row))
        ids[index, place] = torch.tensor(list(row))
        mask[index, place] = 1
    return ids, mask
