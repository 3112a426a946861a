"""An adapted embedding.

    y[i] = W[i] + s · B A[:, i]        W: [vocab, dim]   A: [r, vocab]   B: [dim, r]

A starts at zero and B normal, as in loralib and PEFT: still ΔW = 0, and rows never looked up never change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .batched import routes
from .layer import LoraFactors, LoraLayer, Shapes


class EmbeddingLayer(LoraLayer):
    lora_kind = "embedding"
    lora_transposed = True  # the weight is [vocab, dim], ΔW = (B A)ᵀ

    def lora_shapes(self, rank: int) -> Shapes:
        return (rank, self.num_embeddings), (self.embedding_dim, rank)  # type: ignore[attr-defined]

    def lora_fresh(self, shapes: Shapes, rank: int, init: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.zeros(shapes[0], dtype=dtype, device=device), torch.randn(shapes[1], dtype=dtype, device=device)

    def forward(self, ids: Tensor, *args, **kwargs) -> Tensor:
        y = super().forward(ids, *args, **kwargs)  # type: ignore[misc]
        if self.lora_route is not None:
            return routes.add_updates(self, y, ids, lambda ids, factors: self._update(ids, factors, y.dtype))
        for factors, scale in self.lora_in_use():
            y = y + self._update(ids, factors, y.dtype) * scale
        return y

    def _update(self, ids: Tensor, factors: LoraFactors, dtype: torch.dtype) -> Tensor:
        rows = F.embedding(ids, factors.A.T, self.padding_idx)  # type: ignore[attr-defined]
        if factors.dropout:
            rows = F.dropout(rows, factors.dropout, self.training)  # type: ignore[attr-defined]
        update = F.linear(rows.to(dtype), factors.B.to(dtype))
        # Gemma's embedding multiplies its output; the update is part of the weight, so it is multiplied too.
        factor = getattr(self, "embed_scale", None)
        return update if factor is None else update * torch.as_tensor(factor).to(update)
