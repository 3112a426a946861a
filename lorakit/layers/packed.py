"""A linear that holds several projections side by side (GPT-2's c_attn, Phi-3's qkv_proj), some of them adapted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import add_packed
from ..ops.packed import expand_packed
from .layer import LoraFactors, Shapes
from .linear import Conv1DLayer, LinearLayer


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
        x = F.dropout(x, factors.dropout, self.training) if factors.dropout else x  # type: ignore[attr-defined]
        return add_packed(y, x, factors.A, factors.B, scale, self.lora_parts, into=self.lora_fresh_output)

    def lora_full(self, factors: LoraFactors) -> tuple[Tensor, Tensor]:
        B = factors.B.detach()
        return factors.A.detach(), expand_packed(B, self.lora_parts) if B.dim() == 3 else B


class PackedConv1DLayer(PackedLayer, Conv1DLayer):
    """A packed projection stored as [in, out], as GPT-2's c_attn."""
