"""Adapted convolutions, 1d to 3d, with the base's own stride, padding (and its mode), dilation and groups.

    y = conv(x, W) + s · conv₁(conv(x, A), B)        W: [out, in/g, *k]   A: [r, in/g, *k]   B: [out, r, 1...]

ΔW = s · B A is a rank-r update of the weight, read as a matrix [out, in/g · k]; all g groups share A. PEFT's grouped
form is supported too: A [r, in, *k] over all inputs and a grouped B [out, r/g, 1...]. It is more general than any
change of the weight, so only factors with the form above (blocks along the groups) can be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import base_of
from .layer import LoraLayer, Shapes
from .updates.update import Pair

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLayer(LoraLayer):
    """The mixin for convolutions."""

    lora_kind = "conv"
    in_channels: int
    groups: int
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    padding_mode: str
    dilation: tuple[int, ...]
    _reversed_padding_repeated_twice: list[int]
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def lora_shapes(self, rank: int, parts: tuple[bool, ...] | None = None) -> Shapes:
        size_out, *others = base_of(self).shape(self)
        return (rank, *others), (size_out, rank, *(1 for _ in others[1:]))

    def lora_fits(self, A: Tensor, B: Tensor) -> str | None:
        why = super().lora_fits(A, B)
        groups = self.groups
        if why and groups > 1 and A.shape[0] % groups == 0:
            size_out, _, *kernel = base_of(self).shape(self)
            down = (A.shape[0], self.in_channels, *kernel)
            up = (size_out, A.shape[0] // groups, *(1 for _ in kernel))
            if (tuple(A.shape), tuple(B.shape)) == (down, up):  # PEFT's form
                return None
        return why

    def lora_laid_out(self, A: Tensor) -> Tensor:
        """channels_last where the weight is: a 3x3 A in another layout would be copied at each call."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        like = formats.get(A.dim())
        if like is None or self.weight.is_contiguous() or not self.weight.is_contiguous(memory_format=like):
            return A
        return A.contiguous(memory_format=like)

    def lora_apply(self, x: Tensor, W: Tensor) -> Tensor:
        return self._conv_forward(x.to(W.dtype), W, None)

    def lora_branch(self, x: Tensor, pair: Pair, like: Tensor) -> Tensor:
        x = (F.dropout(x, pair.dropout, self.training) if pair.dropout else x).to(like.dtype)
        A, B = pair.A.to(x.dtype), pair.B.to(x.dtype)
        groups = self.groups
        conv = _CONV[A.dim() - 2]
        if A.shape[1] * groups == self.in_channels:
            down = self._conv_forward(x, A.repeat(groups, *(1 for _ in A.shape[1:])) if groups > 1 else A, None)
        else:
            padding: Any = self.padding
            if self.padding_mode != "zeros":
                x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
            down = conv(x, A, None, self.stride, padding, self.dilation)
        return conv(down, B, groups=groups)
