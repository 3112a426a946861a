"""Adapted embeddings.

    y[i] = W[i] + s · B A[:, i]        W: [vocab, dim]   A: [r, vocab]   B: [dim, r]

A is initialized to zero and B is normal, as in loralib and PEFT: ΔW = 0, and rows never looked up never change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import LoraLayer, Shapes
from .updates.update import Pair


class EmbeddingLayer(LoraLayer):
    """The mixin for embeddings."""

    lora_kind = "embedding"
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    lora_transposed = True  # the weight is [vocab, dim], ΔW = (B A)ᵀ

    def lora_token_rows(self) -> str | None:
        return None

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        return (rank, self.num_embeddings), (self.embedding_dim, rank)

    def lora_fresh(
        self, shapes: Shapes, rank: int, init: str, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros(shapes[0], dtype=dtype, device=device), torch.randn(shapes[1], dtype=dtype, device=device)

    def lora_apply(self, ids: Tensor, W: Tensor) -> Tensor:
        return self.lora_times_scale(F.embedding(ids, W, self.padding_idx))

    def lora_branch(self, ids: Tensor, pair: Pair, like: Tensor) -> Tensor:
        rows = F.embedding(ids, pair.A.T, self.padding_idx)
        if pair.dropout:
            rows = F.dropout(rows, pair.dropout, self.training)
        return self.lora_times_scale(F.linear(rows.to(like.dtype), pair.B.to(like.dtype)))

    def lora_times_scale(self, update: Tensor) -> Tensor:
        # Gemma's embedding scales its output. The update is part of the weight, so it is scaled too.
        factor = getattr(self, "embed_scale", None)
        return update if factor is None else update * torch.as_tensor(factor).to(update)
