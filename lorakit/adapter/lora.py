"""The low-rank factors of one target module, as a value.

linear     A [r, in]          B [out, r]              (a packed projection: r = n·rank, B zero outside its n blocks)
embedding  A [r, vocab]       B [dim, r]
conv       A [r, in/g, *k]    B [out, r, 1...]        (or PEFT's grouped form: A [r, in, *k], B [out, r/g, 1...])

A DoRA (Liu et al. 2024) has a magnitude too, for W' = magnitude · (W + s · B A) / ‖W + s · B A‖: [out, 1] with the norm of each output's
row, or [1, in] with that of each input's column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..config import MAX_RANK, scale_of
from ..errors import AdapterError
from ..ops.delta import delta
from .checks import check_alpha, check_parts
from .update import Update

Kind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True)
class Factors(Update):
    """ΔW = scale · B A of one module, scale = alpha / rank (or alpha / √rank)."""

    A: Tensor
    B: Tensor
    alpha: float
    kind: Kind = "linear"
    rslora: bool = False
    transposed: bool = False  # a linear whose weight is stored as [in, out] (transformers' Conv1D)
    groups: int = 1  # of a convolution
    parts: tuple[bool, ...] | None = None  # the adapted parts of a packed projection; alpha / rank are those of one part
    magnitude: Tensor | None = None  # DoRA's

    @property
    def rank(self) -> int:
        """The rank of one part: A's rows, shared among the adapted parts of a packed projection."""
        return self.A.shape[0] // (sum(self.parts) if self.parts else 1)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """ΔW in float32, in the weight's own layout: [out, in], [in, out] if transposed, [vocab, dim], [out, in/g, *k].

        AdapterError for PEFT's grouped convolution factors that no change of the weight can express, and for DoRA, whose ΔW depends
        on the weight.
        """
        if self.magnitude is not None:
            raise AdapterError("the change that a DoRA makes depends on the base's weight: it has no ΔW of its own")
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

    @property
    def parameters(self) -> int:
        """How many numbers it holds; not the zeros of a packed B outside its blocks."""
        held = self.B.numel() // (len(self.parts) if self.parts else 1)  # n blocks [out / parts, r] of [out, n·r]
        return self.A.numel() + held + (self.magnitude.numel() if self.magnitude is not None else 0)

    def check(self, module: str) -> None:
        """Raise AdapterError if these factors cannot be an update: shapes, ranks, dtypes, NaN."""

        def wrong(what: str) -> AdapterError:
            return AdapterError(f"adapter factors of '{module}': {what}")

        check_parts(module, self.tensors())
        check_alpha(module, self.alpha)
        if self.A.shape[0] > MAX_RANK:
            raise wrong(f"rank {self.A.shape[0]} is beyond the largest sensible rank, {MAX_RANK}")
        grouped = self.kind == "conv" and self.A.shape[0] == self.B.shape[1] * self.groups
        if self.A.shape[0] != self.B.shape[1] and not grouped:
            raise wrong(
                f"A {list(self.A.shape)} has rank {self.A.shape[0]}, B {list(self.B.shape)} has rank {self.B.shape[1]}; expected the same"
            )
        if self.kind != "conv" and not (self.A.dim() == self.B.dim() == 2):
            raise wrong(f"A {list(self.A.shape)} and B {list(self.B.shape)} should be matrices")
        if self.magnitude is not None:
            sizes = [self.B.shape[0], 1], [1, self.A.flatten(1).shape[1]]
            if list(self.magnitude.shape) not in sizes:
                raise wrong(f"DoRA's magnitude has shape {list(self.magnitude.shape)}; expected {sizes[0]} or {sizes[1]}")
