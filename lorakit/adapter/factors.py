"""The low-rank factors of one target module, as a value.

linear     A [r, in]          B [out, r]              (a packed projection: r = n·rank, B zero outside its n blocks)
embedding  A [r, vocab]       B [dim, r]
conv       A [r, in/g, *k]    B [out, r, 1...]        (or PEFT's grouped form: A [r, in, *k], B [out, r/g, 1...])
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config import MAX_RANK, scale_of
from ..errors import AdapterError
from ..ops.delta import delta

Kind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True)
class Factors:
    """ΔW = scale · B A of one module, scale = alpha / rank (or alpha / √rank)."""

    A: Tensor
    B: Tensor
    alpha: float
    kind: Kind = "linear"
    rslora: bool = False
    transposed: bool = False  # a linear whose weight is stored as [in, out] (transformers' Conv1D)
    groups: int = 1  # of a convolution
    parts: tuple[bool, ...] | None = None  # the adapted parts of a packed projection; alpha / rank are those of one part

    @property
    def rank(self) -> int:
        """The rank of one part: A's rows, shared among the adapted parts of a packed projection."""
        return self.A.shape[0] // (sum(self.parts) if self.parts else 1)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """ΔW in float32, in the weight's own layout: [out, in], [in, out] if transposed, [vocab, dim], [out, in/g, *k].

        AdapterError for PEFT's grouped convolution factors that no change of the weight can express.
        """
        if self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"a grouped convolution's A {list(self.A.shape)} reads across the {self.groups} groups: no change of the weight does the same\n"
                "  keep this adapter unmerged"
            )
        across = self.transposed or self.kind == "embedding"
        if shape is None:
            first, second = self.B.shape[0], self.A.shape[1]
            shape = (second, first) if across else (first, second, *self.A.shape[2:])
        return delta(self.A, self.B, self.scale, shape, across)

    def check(self, module: str) -> None:
        """Raise AdapterError if these factors cannot be an update: shapes, ranks, dtypes, NaN."""

        def wrong(what: str) -> AdapterError:
            return AdapterError(f"adapter factors of '{module}': {what}")

        for name, tensor in (("A", self.A), ("B", self.B)):
            if not tensor.is_floating_point():
                raise wrong(f"{name} has dtype {tensor.dtype}; expected a floating-point type")
            if tensor.dim() < 2 or 0 in tensor.shape:
                raise wrong(f"{name} has shape {list(tensor.shape)}; expected at least two axes, none of them empty")
        if self.A.shape[0] > MAX_RANK:
            raise wrong(f"rank {self.A.shape[0]} is beyond the largest sensible rank, {MAX_RANK}")
        grouped = self.kind == "conv" and self.A.shape[0] == self.B.shape[1] * self.groups
        if self.A.shape[0] != self.B.shape[1] and not grouped:
            raise wrong(
                f"A {list(self.A.shape)} has rank {self.A.shape[0]}, B {list(self.B.shape)} has rank {self.B.shape[1]}; expected the same"
            )
        if self.kind != "conv" and not (self.A.dim() == self.B.dim() == 2):
            raise wrong(f"A {list(self.A.shape)} and B {list(self.B.shape)} should be matrices")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise wrong(f"alpha is {self.alpha}; expected a positive number")
        for name, tensor in (("A", self.A), ("B", self.B)):
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise wrong(
                    f"{name} holds {bad} values that are not finite (NaN or infinity): the training diverged or the file is damaged"
                )
