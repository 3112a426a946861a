"""Adapted linear modules: `nn.Linear`, quantized linears, transformers' `Conv1D`, and packed projections.

    y = base(x) + s · (dropout(x) Aᵀ) Bᵀ        A: [r, in]   B: [out, r]

A packed projection is one linear whose output has several equal parts (q, k, v). With n of them adapted (loralib's
MergedLinear), A is [n·r, in] and B is [n, out/parts, r]: each part has its own low-rank update. In files, this is one
update of rank n·r whose B [out, n·r] is zero outside n blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gain import excess
from ..ops.linear import add_low_rank, needs_plain, reference
from ..ops.projections import Projection, project
from ..ops.shared_mask import mask_for
from .bases import base_of
from .batched import linears
from .batched.groups import group
from .frozen import frozen_linear
from .layer import LoraLayer, Shapes
from .updates.update import LiveUpdate, Pair


class LinearLayer(LoraLayer):
    """The mixin for linears."""

    lora_kind = "linear"
    in_features: int
    out_features: int
    lora_plain = False  # whether the base computes just x Wᵀ + b
    lora_fresh_output = False  # whether nothing else references the base's output; a custom forward may keep it

    @classmethod
    def lora_class_attributes(cls, base: type[nn.Module]) -> dict[str, object]:
        own_forward = base.forward is nn.Linear.forward
        return {
            "lora_plain": cls is LinearLayer and own_forward,
            "lora_fresh_output": own_forward or base.forward.__qualname__ == "Conv1D.forward",
        }

    def lora_sizes(self) -> tuple[int, int]:
        """(in, out)"""
        return self.in_features, self.out_features

    def lora_token_rows(self) -> str | None:
        return super().lora_token_rows() if self.lora_transposed else None

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        size_in, size_out = self.lora_sizes()
        return (rank, size_in), (size_out, rank)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        active = self.lora_in_use() if self.lora_route is None else []
        if not active and self.lora_route is None:
            return super(LoraLayer, self).forward(x, *args, **kwargs)
        fusible = projection_of(self, x) if makes_gradients(self) and not args and not kwargs else None
        if fusible is not None:
            projection, dropout = fusible
            return project(x, projection, mask_for(x, dropout, self) if dropout else None)
        if self.lora_route is not None:
            return linears.linear(self, super(LoraLayer, self).forward, x, *args, **kwargs)
        if (own := self.lora_own_input(x, active)) is not None:
            return super(LoraLayer, self).forward(own, *args, **kwargs)
        return self.lora_updated(super(LoraLayer, self).forward(x, *args, **kwargs), x, active)

    def lora_add(self, y: Tensor, x: Tensor, pair: Pair, scale: float) -> Tensor:
        dropped = self.training and pair.dropout
        mask = mask_for(x, pair.dropout, self) if dropped and not needs_plain() else None
        if dropped and mask is None:  # torch.compile draws its own masks
            return y + reference(F.dropout(x, pair.dropout).to(y.dtype), pair.A, pair.B, scale)
        return add_low_rank(y, x, pair.A, pair.B, scale, mask, into=self.lora_fresh_output)

    def lora_branch(self, x: Tensor, pair: Pair, like: Tensor) -> Tensor:
        return self.lora_add(like.new_zeros(*x.shape[:-1], like.shape[-1]), x, pair, 1.0)

    def lora_apply(self, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x.to(W.dtype), W.T if self.lora_transposed else W)


def projection_of(module: nn.Module, x: Tensor) -> tuple[Projection, float] | None:
    """Return a linear and its update as one node can compute them, and the update's dropout; None if it cannot.

    It can for a frozen weight in x's dtype, nn.Linear's own forward, at most one active adapter (or one for each group
    of rows) whose update is a pair of matrices, and no autocast.
    """
    if type(module) is not nn.Linear and not (isinstance(module, LinearLayer) and module.lora_plain):
        return None
    plain = None if x.dim() < 2 or needs_plain() else frozen_linear(module, x)
    if plain is None:
        return None
    weight, bias = plain
    active: list[tuple[LiveUpdate, float]] = []
    if isinstance(module, LinearLayer):
        if module.lora_route is not None:
            grouped = group(module, x)
            if grouped is None:
                return None
            return Projection(weight, bias, grouped.A, grouped.B, grouped.scale, grouped.h), grouped.dropout
        active = module.lora_in_use()
    if len(active) > 1:
        return None
    if not active or not isinstance(module, LinearLayer):
        return Projection(weight, bias, None, None, 1.0), 0.0
    update, share = active[0]
    pair = update.pair(module)
    if pair is None:
        return None
    h = None if pair.gain is None else excess(pair.gain, share)
    return Projection(weight, bias, pair.A, pair.B, pair.scale * share, h), pair.dropout if module.training else 0.0


def makes_gradients(module: nn.Module) -> bool:
    """Whether gradients may be needed: if they are enabled, and always in training mode. The first run of (reentrant)
    gradient checkpointing has none enabled, but must draw the same dropout as the second."""
    return torch.is_grad_enabled() or module.training


class Conv1DLayer(LinearLayer):
    """The mixin for transformers' Conv1D (GPT-2): a linear whose weight is [in, out]."""

    lora_transposed = True

    def lora_sizes(self) -> tuple[int, int]:
        size_in, size_out = base_of(self).shape(self)
        return size_in, size_out
