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
from torch import Tensor, nn

from ..ops.autocast import is_casting
from ..ops.gain import excess
from ..ops.linear import needs_plain
from ..ops.summed import summed_weight
from .bases import base_of
from .frozen import plain_weight
from .layer import LoraLayer, Shapes
from .linear import makes_gradients
from .updates.update import Pair

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLayer(LoraLayer):
    """The mixin for convolutions."""

    lora_kind = "conv"
    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    padding_mode: str
    dilation: tuple[int, ...]
    _reversed_padding_repeated_twice: list[int]
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    lora_plain = False  # whether the base computes just the convolution

    @classmethod
    def lora_class_attributes(cls, base: type[nn.Module]) -> dict[str, object]:
        return {"lora_plain": base.forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)}

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.lora_plain and not args and not kwargs and makes_gradients(self):
            summed = self._summed(x)
            if summed is not None:
                return self._conv_forward(x, *summed)
        return super().forward(x, *args, **kwargs)

    def _summed(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return W + s · B A and the bias if that is cheaper than two convolutions more, None otherwise."""
        active = self.lora_in_use() if self.lora_route is None else []
        pair = active[0][0].pair(self) if len(active) == 1 else None
        if pair is None or (pair.dropout and self.training) or needs_plain():
            return None
        plain = plain_weight(self)
        if plain is None or is_casting(x):
            return None
        share = active[0][1]
        h = None if pair.gain is None else excess(pair.gain, share)
        W = summed_weight(x, self.in_channels, plain[0], pair.A, pair.B, pair.scale * share, h)
        return None if W is None else (W, plain[1])

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

    def lora_by_output(self, vector: Tensor, y: Tensor) -> Tensor:
        return vector.view(*vector.shape, *(1 for _ in self.kernel_size))

    def lora_apply(self, x: Tensor, W: Tensor) -> Tensor:
        return self._conv_forward(x.to(W.dtype), W, None)

    def lora_add(self, y: Tensor, x: Tensor, pair: Pair, scale: float) -> Tensor:
        # Scale the narrow convolution's output: on the wide one, backward would make a scaled copy of the gradient.
        down = self._down(x, pair, y)
        return y + self._up(down if scale == 1 else down * scale, pair)

    def lora_branch(self, x: Tensor, pair: Pair, like: Tensor) -> Tensor:
        return self._up(self._down(x, pair, like), pair)

    def _up(self, down: Tensor, pair: Pair) -> Tensor:
        return _CONV[pair.B.dim() - 2](down, pair.B.to(down.dtype), groups=self.groups)

    def _down(self, x: Tensor, pair: Pair, like: Tensor) -> Tensor:
        x = (F.dropout(x, pair.dropout, self.training) if pair.dropout else x).to(like.dtype)
        A = pair.A.to(x.dtype)
        groups = self.groups
        if A.shape[1] * groups == self.in_channels:
            return self._conv_forward(x, A.repeat(groups, *(1 for _ in A.shape[1:])) if groups > 1 else A, None)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return _CONV[A.dim() - 2](x, A, None, self.stride, padding, self.dilation)
