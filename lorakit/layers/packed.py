"""A linear that holds several projections side by side (GPT-2's c_attn, Phi-3's qkv_proj), some of them adapted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import add_packed
from ..ops.packed import expand_packed
from .layer import Shapes
from .linear import Conv1DLayer, LinearLayer
from .updates.update import Pair


def packed_shapes(sizes: tuple[int, int], parts: tuple[bool, ...], rank: int) -> Shapes:
    """A [n·r, in] and B [n, out/parts, r] of a packed projection."""
    size_in, size_out = sizes
    return (sum(parts) * rank, size_in), (sum(parts), size_out // len(parts), rank)


class PackedLayer(LinearLayer):
    """One linear that holds several projections, some of them adapted.
    `lora_parts` is set when the class is swapped.
    """

    lora_parts: tuple[bool, ...]

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        """Without `parts`, of an adapter that is not packed, beside one that is."""
        return super().lora_shapes(rank) if parts is None else packed_shapes(self.lora_sizes(), parts, rank)

    def lora_fits(self, A: Tensor, B: Tensor) -> str | None:
        size_in, size_out = self.lora_sizes()
        if B.dim() == 3:
            fits = A.shape[1] == size_in and B.shape[1] * len(self.lora_parts) == size_out
        else:
            fits = A.shape[1] == size_in and tuple(B.shape) == (size_out, A.shape[0])
        return (
            None if fits else f"A {list(A.shape)} and B {list(B.shape)} do not fit a packed [{size_in} -> {size_out}]"
        )

    def lora_add(self, y: Tensor, x: Tensor, pair: Pair, scale: float) -> Tensor:
        if pair.B.dim() == 2:  # another adapter on this module, not packed
            return super().lora_add(y, x, pair, scale)
        x = F.dropout(x, pair.dropout, self.training) if pair.dropout else x
        return add_packed(y, x, pair.A, pair.B, scale, self.lora_parts, into=self.lora_fresh_output)

    def lora_full(self, pair: Pair) -> tuple[Tensor, Tensor]:
        B = pair.B.detach()
        return pair.A.detach(), expand_packed(B, self.lora_parts) if B.dim() == 3 else B


class PackedConv1DLayer(PackedLayer, Conv1DLayer):
    """A packed projection stored as [in, out], as GPT-2's c_attn."""
