"""LoRA's update of one module, as a value (Hu et al. 2021, section 4.1): ΔW = s · B A, s = alpha / r.

linear     A [r, in]          B [out, r]              (packed projection: r = n·rank, B is zero outside its n blocks)
embedding  A [r, vocab]       B [dim, r]
conv       A [r, in/g, *k]    B [out, r, 1...]        (or PEFT's grouped form: A [r, in, *k], B [out, r/g, 1...])

A DoRA is built on such factors: see `dora`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..config import MAX_RANK, scale_of
from ..errors import AdapterError
from ..ops.delta import as_matrices, delta, delta_rows
from .algebra.svd import Svd, product_svd
from .checks import check_alpha, check_tensors
from .update import LowRank, Read, Rows, Update, as_matrix_shape

Kind = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True)
class FactorShapes:
    """The shapes of a module's low-rank factors, except for their rank. `inner`: the sizes of A's axes after the rank;
    `axes`: the number of B's axes.
    """

    kind: Kind
    inner: tuple[int, ...]
    axes: int = 2
    transposed: bool = False
    groups: int = 1
    parts: tuple[bool, ...] | None = None

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> FactorShapes:
        """Return the factor shapes for a linear's weight [out, in] or a convolution's [out, in, *k]."""
        return cls("conv" if len(shape) > 2 else "linear", shape[1:], len(shape))

    @property
    def weight_transposed(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return self.transposed or self.kind == "embedding"

    def factors(self, B: Tensor, A: Tensor, alpha: float, rslora: bool = False) -> Factors:
        """Build factors of these shapes from the matrices B [out, r] and A [r, -1]."""
        A, B = A.reshape(A.shape[0], *self.inner), B.reshape(*B.shape, *(1,) * (self.axes - 2))
        return Factors(
            A.contiguous(), B.contiguous(), alpha, self.kind, rslora, self.transposed, self.groups, self.parts
        )


@dataclass(frozen=True)
class Factors(Update):
    """ΔW = scale · B A of one module; scale = alpha / rank, with `rslora` alpha / √rank (Kalajdzievski 2023)."""

    A: Tensor
    B: Tensor
    alpha: float
    kind: Kind = "linear"
    rslora: bool = False
    transposed: bool = False  # a linear whose weight is stored as [in, out] (transformers' Conv1D)
    groups: int = 1  # of a convolution
    # the adapted parts of a packed projection; alpha / rank are those of one part
    parts: tuple[bool, ...] | None = None

    @property
    def variant(self) -> str:
        return "lora"

    @property
    def rank(self) -> int:
        """The rank of one part: the rows of A over the number of adapted parts of a packed projection."""
        return self.A.shape[0] // (sum(self.parts) if self.parts else 1)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    @property
    def weight_transposed(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return self.transposed or self.kind == "embedding"

    @property
    def parameters(self) -> int:
        """The number of elements, without the zeros of a packed B outside its blocks."""
        held = self.B.numel() // (len(self.parts) if self.parts else 1)  # n blocks [out / parts, r] of [out, n·r]
        return self.A.numel() + held

    @property
    def sizes(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def factors(self) -> Factors:
        return self

    def map_factors(self, change: Callable[[Factors], Factors]) -> Factors:
        return change(self)

    def check(self, module: str) -> None:
        """Raise AdapterError unless shapes, rank, dtypes and alpha are sound and all values finite."""

        def wrong(what: str) -> AdapterError:
            return AdapterError(f"adapter factors of '{module}': {what}")

        check_tensors(module, self.tensors())
        check_alpha(module, self.alpha)
        if self.A.shape[0] > MAX_RANK:
            raise wrong(f"rank {self.A.shape[0]} is beyond the largest sensible rank, {MAX_RANK}")
        grouped = self.kind == "conv" and self.A.shape[0] == self.B.shape[1] * self.groups
        if self.A.shape[0] != self.B.shape[1] and not grouped:
            raise wrong(
                f"A {list(self.A.shape)} has rank {self.A.shape[0]}, B {list(self.B.shape)} has rank "
                f"{self.B.shape[1]}; expected the same"
            )
        if self.kind != "conv" and not (self.A.dim() == self.B.dim() == 2):
            raise wrong(f"A {list(self.A.shape)} and B {list(self.B.shape)} should be matrices")

    def unmergeable(self) -> str | None:
        if self.A.shape[0] == self.B.shape[1]:
            return None
        return (
            "carries PEFT's grouped form, whose A reads across the convolution's groups: no change of its weight does "
            "the same\n"
            "  keep this adapter unmerged"
        )

    def times(self, weight: float, module: str) -> Factors:
        """Multiply ΔW: |weight| goes into alpha and the sign into B, so that no element is rounded."""
        if not weight:
            return replace(self, B=torch.zeros_like(self.B))
        return replace(self, B=self.B if weight > 0 else -self.B, alpha=self.alpha * abs(weight))

    # ΔW by itself

    def weight_shape(self) -> tuple[int, ...]:
        out, first = self.B.shape[0], self.A.shape[1]
        return (first, out) if self.weight_transposed else (out, first, *self.A.shape[2:])

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return ΔW in float32 (float64 stays), in the weight's layout: [out, in], or [in, out] if transposed, [vocab,
        dim], [out, in/g, *k].

        Raises AdapterError for PEFT's grouped convolution factors, which no change of the weight can express.
        """
        if self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"a grouped convolution's A {list(self.A.shape)} reads across the {self.groups} groups: no change of "
                "the weight does the same\n"
                "  keep this adapter unmerged"
            )
        return delta(
            self.A, self.B, self.scale, self.weight_shape() if shape is None else shape, self.weight_transposed
        )

    def matrix(self, transposed: bool = False) -> Tensor:
        """Return s · B A as [out, in·k], however the weight is stored."""
        A, B = as_matrices(self.A, self.B)
        return (B * self.scale) @ A

    def low_rank(self) -> LowRank:
        A, B = self.A.detach().double().flatten(1), self.B.detach().double().flatten(1)
        if A.shape[0] != B.shape[1]:  # PEFT's grouped convolution: each group of outputs has rows of A of its own
            B = torch.block_diag(*B.chunk(self.groups))
        return LowRank(B * self.scale, A)

    def singular_values(self, rank: int | None = None, keep: float | None = None) -> list[Svd]:
        return [product_svd(B * self.scale, A) for A, B in self.blocks()]

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs of matrices A [r, in·k], B [rows, r]: one, or one for each adapted part if packed."""
        A, B = as_matrices(self.A, self.B)
        if not self.parts:
            return [(A, B)]
        r, size = self.rank, B.shape[0] // len(self.parts)
        adapted = [i for i, part in enumerate(self.parts) if part]
        return [
            (A[j * r : (j + 1) * r], B[i * size : (i + 1) * size, j * r : (j + 1) * r]) for j, i in enumerate(adapted)
        ]

    def factor_shapes(self, module: str) -> FactorShapes:
        if self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"'{module}' is a grouped convolution in PEFT's form, whose A {list(self.A.shape)} reads across the "
                "groups: "
                "no change of the weight does the same\n"
                f"  leave it out: lorakit.adapter.algebra.edit.prune(adapter, ['{module}']) (lorakit edit IN OUT "
                f"--drop {module})"
            )
        return FactorShapes(self.kind, tuple(self.A.shape[1:]), self.B.dim(), self.transposed, self.groups, self.parts)

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        """Decide by the shape; if both layouts fit, by the kind of the module."""
        out, first = self.B.shape[0], self.A.shape[1]
        plain, transposed = (out, first, *self.A.shape[2:]), (first, out)
        fits = as_matrix_shape(shape) == as_matrix_shape(plain)
        if self.kind == "linear" and shape == plain == transposed:
            return self.transposed or file_transposed or conv1d
        if self.kind != "conv" and shape == transposed and (self.kind == "embedding" or not fits):
            return True
        return False if fits and self.kind != "embedding" else None

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        A, B = as_matrices(self.A, self.B)
        scale = self.scale * weight

        return lambda rows, _: delta_rows(A, B, scale, rows, transposed)

    def output_tensors(self) -> dict[str, Tensor]:
        return {"B": self.B}

    def as_factors(self) -> Factors:
        return self

    def as_lora(self) -> Factors:
        return self


def factors_of(updates: Mapping[str, Update]) -> dict[str, Factors]:
    """Return the low-rank factors (`Update.factors`) of each update that has any, by module.

    For reading only: a DoRA is more than its factors.
    """
    return {module: f for module, update in updates.items() if (f := update.factors) is not None}
