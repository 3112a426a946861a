"""Adapted linear modules: `nn.Linear`, quantized linears, transformers' `Conv1D`, and packed projections.

    y = base(x) + s · (dropout(x) Aᵀ) Bᵀ        A: [r, in]   B: [out, r]

A packed projection is one linear whose output is several equal parts (q, k, v); with n of them adapted (loralib's
MergedLinear) A is [n·r, in] and B is [n, out/parts, r], each part with a low-rank update of its own. As files hold it,
that is one update of rank n·r whose B [out, n·r] is zero outside n blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.blocks import expand_packed
from ..ops.linear import add_low_rank, add_packed, frozen_linear, needs_plain
from .layer import LoraFactors, LoraLayer, Shapes


class LinearLayer(LoraLayer):
    lora_kind = "linear"
    # Both are set with the adapted class (see `swap`), from the base's own forward:
    lora_plain = False  # the base computes just x Wᵀ + b
    lora_fresh_output = False  # nothing else keeps the base's output. A subclass with a forward of its own may keep it

    def lora_sizes(self) -> tuple[int, int]:
        """(in, out)"""
        return self.in_features, self.out_features  # type: ignore[attr-defined]

    def lora_shapes(self, rank: int) -> Shapes:
        size_in, size_out = self.lora_sizes()
        return (rank, size_in), (size_out, rank)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        active = self.lora_in_use()
        if not active:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if len(active) == 1 and not args and not kwargs and self._one_node(x, active[0][0]):
            factors, scale = active[0]
            return frozen_linear(x, self.weight, self.bias, factors.A, factors.B, scale)  # type: ignore[attr-defined]
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for factors, scale in active:
            inputs = F.dropout(x, factors.dropout, self.training) if factors.dropout else x  # type: ignore[attr-defined]
            y = self.lora_add(y, inputs, factors, scale)
        return y

    def lora_add(self, y: Tensor, x: Tensor, factors: LoraFactors, scale: float) -> Tensor:
        return add_low_rank(y, x, factors.A, factors.B, scale, into=self.lora_fresh_output)

    def _one_node(self, x: Tensor, factors: LoraFactors) -> bool:
        """Whether base and update may be computed as one autograd node: a plain frozen weight, no casting, no dropout."""
        weight, bias = self.weight, self.bias  # type: ignore[attr-defined]
        return (
            self.lora_plain
            and x.dtype == weight.dtype
            and type(weight) in (nn.Parameter, Tensor)
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not (factors.dropout and self.training)  # type: ignore[attr-defined]
            and x.dim() > 1
            and not torch.is_autocast_enabled(x.device.type)
            and not needs_plain()
        )


class Conv1DLayer(LinearLayer):
    """transformers' Conv1D (GPT-2): a linear with its weight as [in, out]."""

    lora_transposed = True

    def lora_sizes(self) -> tuple[int, int]:
        size_in, size_out = self.weight.shape  # type: ignore[attr-defined]
        return size_in, size_out


def packed_shapes(sizes: tuple[int, int], parts: tuple[bool, ...], rank: int) -> Shapes:
    """A [n·r, in] and B [n, out/parts, r] of a packed projection."""
    size_in, size_out = sizes
    return (sum(parts) * rank, size_in), (sum(parts), size_out // len(parts), rank)


class PackedLayer(LinearLayer):
    """One linear that holds several projections, some of them adapted. `lora_parts` is set when the class is swapped."""

    lora_parts: tuple[bool, ...]

    def lora_shapes(self, rank: int) -> Shapes:
        return packed_shapes(self.lora_sizes(), self.lora_parts, rank)

    def lora_add(self, y: Tensor, x: Tensor, factors: LoraFactors, scale: float) -> Tensor:
        if factors.B.dim() == 2:  # another adapter on this module, not packed
            return super().lora_add(y, x, factors, scale)
        return add_packed(y, x, factors.A, factors.B, scale, self.lora_parts)

    def lora_full(self, factors: LoraFactors) -> tuple[Tensor, Tensor]:
        B = factors.B.detach()
        return factors.A.detach(), expand_packed(B, self.lora_parts) if B.dim() == 3 else B


class PackedConv1DLayer(PackedLayer, Conv1DLayer):
    """A packed projection stored as [in, out], as GPT-2's c_attn."""
