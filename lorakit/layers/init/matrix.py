"""A module's weight, its inputs and its outputs as matrices: y = x Wᵀ, with W [out, in·k] and one row of x for each
token, or for each place of a convolution's kernel.

    linear      x [..., in]                y [..., out]
    conv        x [batch, in, *size]       y [batch, out, *size]     one row per place: in/g · k elements, g groups
    embedding   (its inputs are ids)       W = the stored weight [vocab, dim], transposed
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases import base_of
from ..swap import mixin_for


@dataclass(frozen=True)
class Matrix:
    """`parts`: which parts of a packed projection are adapted; None for other modules."""

    module: nn.Module
    parts: tuple[bool, ...] | None = None

    @property
    def kind(self) -> str:
        """The layer's kind: "linear", "conv" or "embedding"."""
        return self._mixin.lora_kind

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return self._mixin.lora_transposed

    @property
    def _mixin(self) -> Any:
        return mixin_for(self.module)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The dense weight's shape, in the layout of the module's class."""
        return base_of(self.module).shape(self.module)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in·k)"""
        first, *others = self.stored_shape
        rest = math.prod(others)
        return (rest, first) if self.transposed else (first, rest)

    @property
    def adapted_rows(self) -> list[slice]:
        """The rows of W that have an update of their own: all, or those of each adapted part."""
        out, _ = self.shape
        if self.parts is None:
            return [slice(0, out)]
        size = out // len(self.parts)
        return [slice(i * size, (i + 1) * size) for i, adapted in enumerate(self.parts) if adapted]

    def read(self) -> Tensor:
        """Read W, in float32 (float64 stays)."""
        return self.of(base_of(self.module).dense(self.module))

    def of(self, stored: Tensor) -> Tensor:
        """Return a weight in the layout of the module's class as a matrix, in float32 (float64 stays)."""
        wide = stored.detach().to(torch.promote_types(stored.dtype, torch.float32))
        return wide.T if self.transposed else wide.flatten(1)

    def factors(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the factors as the layer holds them. `pairs`: (A [r, in·k], B [rows, r]) of each of `adapted_rows`."""
        A, B = torch.cat([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
        if self.parts is not None:
            return A, B
        A, B = pairs[0]
        if self.kind == "conv":
            kernel = self.stored_shape[2:]
            return A.reshape(len(A), *self.stored_shape[1:]), B.reshape(*B.shape, *(1 for _ in kernel))
        return A, B

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the input as rows: [groups, rows, in/g·k]; one group for a linear."""
        if self.kind != "conv":
            return x.reshape(1, -1, x.shape[-1])
        conv: Any = self.module
        dims = len(conv.kernel_size)
        x = x if x.dim() == dims + 2 else x[None]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, step, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
            x = x.unfold(2 + axis, (size - 1) * dilation + 1, step)[..., ::dilation]  # [batch, in, *places, *k]
        x = x.unflatten(1, (conv.groups, -1)).movedim(1, 0)  # [g, batch, in/g, *places, *k]
        x = x.movedim(2, 2 + dims)  # [g, batch, *places, in/g, *k]
        return x.flatten(1, 1 + dims).flatten(2)

    def output_rows(self, y: Tensor) -> Tensor:
        """Return the output, or its gradient, as rows that belong to those of the input: [groups, rows, out/g]."""
        if self.kind != "conv":
            return y.reshape(1, -1, y.shape[-1])
        conv: Any = self.module
        y = y if y.dim() == len(conv.kernel_size) + 2 else y[None]
        y = y.unflatten(1, (conv.groups, -1)).movedim(1, 0)  # [g, batch, out/g, *places]
        return y.movedim(2, -1).flatten(1, -2)

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the gradient of W [out, in·k], in float32. `x`: the layer's input; `g`: its output's gradient."""
        rows, grads = self.input_rows(x), self.output_rows(g)
        wide = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
        return (grads.to(wide).mT @ rows.to(wide)).flatten(0, 1)
