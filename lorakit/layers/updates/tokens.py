"""Trained rows of an embedding or of an output layer on a live module: see `adapter.tokens`.

    embedding   y[i] += rows[i] - W[ids[i]]     for the positions that hold a trained token
    linear      y[..., ids] += x (rows - W[ids])ᵀ

`original` holds W[ids] as they were, so that ΔW stays what it is when other adapters are merged. A weight that two
modules share (tied embeddings) has one update, which the second module reads through `TiedRows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapter.tokens import Tokens
from ...adapter.update import Rows
from ...config import LoraConfig
from ...errors import AdapterError, TargetError, listing
from ..bases import base_of
from ..token_targets import tokens_of
from .update import LiveUpdate, device_of, master_dtype

if TYPE_CHECKING:
    from ...adapter.lora import Kind
    from ..layer import LoraLayer


class TokenRows(LiveUpdate):
    """One adapter's rows of one module. `weight`: [n, dim]."""

    counted = "tokens"
    ids: Tensor
    original: Tensor

    def __init__(self, tokens: tuple[int, ...], weight: Tensor, original: Tensor, trainable: bool):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)
        self.tokens, self.rank = tokens, len(tokens)
        ids = torch.tensor(tokens, dtype=torch.long, device=weight.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("original", original, persistent=False)

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        ids = tokens_of(config, name)
        if not ids:
            raise TargetError(
                f"'{name}' has no trainable tokens (LoraConfig.trainable_tokens)\n"
                "  name their ids, or leave the module out of the targets"
            )
        size = _vocabulary(layer, name)
        beyond = [token for token in ids if token >= size]
        if beyond:
            raise TargetError(
                f"'{name}' has {size:,} rows, and trainable_tokens has ids beyond: {listing(map(str, beyond), 4)}\n"
                f"  give it rows first: model.resize_token_embeddings({max(beyond) + 1}), or lorakit train --add-tokens"
            )
        original = _rows_of(layer, ids)
        return cls(ids, original.to(master_dtype(layer), copy=True), original, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Tokens, config: LoraConfig, trainable: bool) -> Self:
        size, dim = _vocabulary(layer, name), base_of(layer).shape(layer)[1]
        if value.weight.shape[1] != dim:
            raise AdapterError(
                f"the adapter's trained tokens do not fit '{name}': their rows have {value.weight.shape[1]} elements, "
                f"the module's {dim}"
            )
        if value.ids[-1] >= size:
            raise AdapterError(
                f"the adapter's trained tokens do not fit '{name}': they go up to id {value.ids[-1]}, and it has "
                f"{size:,} rows\n"
                f"  give it rows for the added tokens first: model.resize_token_embeddings({value.ids[-1] + 1})"
            )
        dtype = master_dtype(layer) if trainable else None
        weight = value.weight.detach().to(device_of(layer), dtype, copy=True)
        return cls(value.ids, weight, _rows_of(layer, value.ids), trainable)

    def value(self, layer: LoraLayer) -> Tokens:
        kind: Kind = "embedding" if layer.lora_kind == "embedding" else "linear"
        return Tokens(self.tokens, self.weight.detach(), kind)

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        delta = self._delta().to(y0.dtype)
        if layer.lora_kind == "embedding":
            # Each position's place among the trained tokens; the last row, zero, is for all others.
            place = torch.searchsorted(self.ids, x.contiguous()).clamp_(max=len(self.ids) - 1)
            place = torch.where(self.ids[place] == x, place, len(self.ids))
            return layer.lora_times_scale(F.embedding(place, torch.cat([delta, delta.new_zeros(1, delta.shape[1])])))
        return torch.zeros_like(y0).index_add(-1, self.ids, F.linear(x.to(y0.dtype), delta))

    def rows(self, layer: LoraLayer, weight: float) -> Rows:
        delta, ids = weight * self._delta().detach(), self.ids

        def of(rows: slice, block: Tensor) -> Tensor:
            change = torch.zeros_like(block, dtype=delta.dtype)
            inside = (ids >= rows.start) & (ids < rows.stop)
            change[ids[inside] - rows.start] = delta[inside]
            return change

        return of

    def twin(self) -> LiveUpdate:
        return TiedRows(self)

    def _delta(self) -> Tensor:
        return self.weight - self.original.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"tokens={listing(map(str, self.tokens), 4)}, rows={list(self.weight.shape)}"


class TiedRows(LiveUpdate):
    """The update of another module that has the same weight. It has no parameters of its own."""

    tied = True
    counted = "tokens"

    def __init__(self, of: TokenRows):
        super().__init__()
        self._of = [of]  # in a list, so that its parameters are not this module's too
        self.rank = of.rank

    def value(self, layer: LoraLayer) -> Tokens:
        return self._of[0].value(layer)

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        return self._of[0].change(layer, x, y0)

    def rows(self, layer: LoraLayer, weight: float) -> Rows:
        return self._of[0].rows(layer, weight)


def _vocabulary(layer: LoraLayer, name: str) -> int:
    """Return the number of rows of its weight. Raises TargetError if they are not those of tokens."""
    why = layer.lora_token_rows()
    if why is not None:
        raise TargetError(f"'{name}' has no row for each token: {why} (trainable_tokens)")
    return base_of(layer).shape(layer)[0]


def _rows_of(layer: LoraLayer, ids: tuple[int, ...]) -> Tensor:
    """Copy the base's rows of these ids."""
    W = base_of(layer).dense(layer)
    return W[torch.tensor(ids, dtype=torch.long, device=W.device)].to(device_of(layer), copy=True)


Live = TokenRows
