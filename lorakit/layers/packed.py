"""Linears that pack several projections (GPT-2's c_attn, Phi-3's qkv_proj), some of which are adapted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import add_packed
from ..ops.packed import expand_packed
from .layer import Shapes
from .linear import Conv1DLayer, LinearLayer
from .updates.update import Pair


def packed_shapes(sizes: tuple[int, int], parts: tuple[bool, ...], rank: int) -> Shapes:
    """Return the shapes of A [n·r, in] and B [n, out/parts, r]. `sizes`: (in, out); `parts`: which are adapted."""
    size_in, size_out = sizes
    return (sum(parts) * rank, size_in), (sum(parts), size_out // len(parts), rank)


class PackedLayer(LinearLayer):
    """The mixin for packed linears."""

    lora_parts: tuple[bool, ...]  # which parts are adapted; set by the class swap

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        """Return the shapes of a packed adapter's factors, or of another one's on the same module (`parts` None)."""
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
        if pair.B.dim() == 2:  # another adapter on this module, which is not packed
            return super().lora_add(y, x, pair, scale)
        x = F.dropout(x, pair.dropout, self.training) if pair.dropout else x
        return add_packed(y, x, pair.A, pair.B, scale, self.lora_parts, into=self.lora_fresh_output)

    def lora_times_outputs(self, B: Tensor, g: Tensor) -> Tensor:
        if B.dim() == 2:
            return super().lora_times_outputs(B, g)
        adapted = [i for i, used in enumerate(self.lora_parts) if used]
        return B * g.view(len(self.lora_parts), -1, 1)[adapted]

    def lora_full(self, pair: Pair) -> tuple[Tensor, Tensor]:
        B = pair.B.detach()
        return pair.A.detach(), expand_packed(B, self.lora_parts) if B.dim() == 3 else B


class PackedConv1DLayer(PackedLayer, Conv1DLayer):
    """The mixin for packed linears stored as [in, out], such as GPT-2's c_attn."""
