"""LoKr's update of one module, as a value (LyCORIS, Yeh et al. 2024, section 4).

    ΔW = s · W1 ⊗ W2        W1: [o1, i1]   W2: [o2, i2, *k]   out = o1·o2, in = i1·i2

    (L₁ R₁) ⊗ (L₂ R₂) = (L₁ ⊗ L₂) (R₁ ⊗ R₂)        and the SVD of W1 ⊗ W2 is the Kronecker product of their SVDs

W1 and W2 are each given as a matrix, or as a product of rank r: W1a W1b, W2a W2b (in Tucker form T ×₁ W2a ×₂ W2b).
s = alpha / r, or 1 if neither is a product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from .algebra.svd import Svd, matrix_svd, needed, product_svd
from .checks import check_alpha, check_tensors, multiplied, wide
from .lora import Factors, FactorShapes
from .tucker import matrix_factors, product_shape, wide_product
from .update import LowRank, Read, Rows, Update

FIELDS = ("w1", "w1a", "w1b", "w2", "w2a", "w2b", "t2")
Side = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # W; or Wa, Wb and in Tucker form the core


@dataclass(frozen=True)
class Lokr(Update):
    alpha: float
    w1: Tensor | None = None
    w1a: Tensor | None = None
    w1b: Tensor | None = None
    w2: Tensor | None = None
    w2a: Tensor | None = None
    w2b: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None  # the weight's, where it differs from what the tensors show (kernels)

    @property
    def variant(self) -> str:
        return "lokr"

    @property
    def rank(self) -> int:
        """r; the smaller side of W1 if neither W1 nor W2 is a product."""
        half = self.w1b if self.w1b is not None else self.w2b
        if half is not None:
            return half.shape[0]
        return min(self.w1.shape) if self.w1 is not None else 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.w1b is not None or self.w2b is not None else 1.0

    def check(self, module: str) -> None:
        check_alpha(module, self.alpha)
        check_tensors(module, self.tensors())
        for name, full, a, b in (("w1", self.w1, self.w1a, self.w1b), ("w2", self.w2, self.w2a, self.w2b)):
            if (full is None) == (a is None or b is None) or (a is None) != (b is None):
                raise AdapterError(
                    f"adapter factors of '{module}': expected lokr_{name}, or lokr_{name}_a with lokr_{name}_b"
                )
            tucker = name == "w2" and self.t2 is not None
            if a is not None and b is not None and (a.dim() != 2 or (a.shape[0 if tucker else 1] != b.shape[0])):
                raise AdapterError(
                    f"adapter factors of '{module}': {name}_a {list(a.shape)} and {name}_b {list(b.shape)} do not fit "
                    "together"
                )

    def times(self, weight: float, module: str) -> Lokr:
        """Multiply ΔW: |weight| goes into alpha where the scale depends on it, else into W1; the sign goes into W1."""
        sign, size = math.copysign(1.0, weight), abs(weight)
        in_alpha = bool(size) and (self.w1b is not None or self.w2b is not None)
        name = "w1" if self.w1 is not None else "w1a"
        first = multiplied(getattr(self, name), sign if in_alpha else weight, module)
        changes: dict[str, Any] = {name: first, "alpha": self.alpha * (size if in_alpha else 1.0)}
        return replace(self, **changes)

    def weight_shape(self) -> tuple[int, ...]:
        if self.shape is not None:
            return tuple(self.shape)
        (o1, i1), (out, inner, *k) = _shape(self._first), _shape(self._second)
        return (o1 * out, i1 * inner, *k)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        first, second = _matrix(self._first), _matrix(self._second)
        # As matrices: [o1, i1] ⊗ [o2, i2·k] has its elements in the order of the convolution's [o1·o2, i1·i2, *k].
        full = torch.kron(first, second.flatten(1)).mul_(self.scale)
        shape = shape or self.shape
        if shape is None and second.dim() > 2:
            shape = (full.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
        return full.reshape(shape) if shape else full

    def low_rank(self) -> LowRank | None:
        (l1, r1), (l2, r2) = _halves(self._first), _halves(self._second)
        if l1.shape[1] * l2.shape[1] >= min(l1.shape[0] * l2.shape[0], r1.shape[1] * r2.shape[1]):
            return None
        return LowRank(torch.kron(l1, l2) * self.scale, torch.kron(r1, r2))

    def singular_values(self, rank: int | None = None, keep: float | None = None) -> list[Svd]:
        """Return the largest of the products σ1 σ2, whose vectors are the Kronecker products of W1's and W2's."""
        first, second = _svd(self._first), _svd(self._second)
        values, order = torch.outer(first.S, second.S).flatten().mul(self.scale).sort(descending=True)
        total = first.total * second.total * self.scale**2
        kept = order[: min(rank or len(order), needed(values, total, keep) if keep is not None else len(order))]
        i, j = kept // len(second.S), kept % len(second.S)
        U = torch.einsum("ar,br->abr", first.U[:, i], second.U[:, j]).flatten(0, 1)
        Vt = torch.einsum("ra,rb->rab", first.Vt[i], second.Vt[j]).flatten(1)
        return [Svd(U, values[: len(kept)], Vt, total)]

    def factor_shapes(self, module: str) -> FactorShapes:
        return FactorShapes.of_shape(self.weight_shape())

    def output_tensors(self) -> dict[str, Tensor]:
        """Return W1: each of its rows covers the o2 outputs of W2."""
        return {name: t for name, t in (("w1", self.w1), ("w1a", self.w1a)) if t is not None}

    def as_factors(self) -> Factors | None:
        """Return W1 ⊗ (W2a W2b) = (W1 ⊗ W2a) (I ⊗ W2b), of rank i1 · r; None if W2 is not a product of two matrices."""
        if self.w2a is None or self.w2b is None or self.t2 is not None:
            return None
        first = _matrix(self._first)
        A = torch.kron(torch.eye(first.shape[1], dtype=first.dtype), wide(self.w2b))
        return Factors(A, torch.kron(first, wide(self.w2a)), self.scale * A.shape[0])

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        """Compute ΔW by rows: row i of W1 ⊗ W2 is row i // o2 of W1 times row i % o2 of W2; for a transposed weight
        columns likewise.
        """
        first, second, scale = _matrix(self._first), _matrix(self._second).flatten(1), self.scale * weight
        first, second = (first.T, second.T) if transposed else (first, second)

        def change(rows: slice, _: Tensor) -> Tensor:
            i = torch.arange(shape[0], device=first.device)[rows]
            return (first[i // second.shape[0], :, None] * second[i % second.shape[0], None, :]).flatten(1).mul_(scale)

        return change

    @property
    def _first(self) -> Side:
        return self.w1, self.w1a, self.w1b, None

    @property
    def _second(self) -> Side:
        return self.w2, self.w2a, self.w2b, self.t2


def divided(size: int, factor: int | None = None) -> tuple[int, int]:
    """Divide an axis of a weight among W1 and W2, W1's share first.

    `factor`: W1's share if it divides the axis; else the largest divisor up to it and to the root, as in LyCORIS.
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    most = min(factor or size, math.isqrt(size))
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first


def kron_shapes(
    out: int, inner: int, kernel: tuple[int, ...], rank: int, factor: int | None = None, both: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a new LoKr's tensors, as PEFT and LyCORIS choose them: products of this rank where that is
    smaller, of W1 only with `both`.
    """
    (o1, o2), (i1, i2) = divided(out, factor), divided(inner, factor)
    shapes: dict[str, tuple[int, ...]] = {}
    if both and 2 * rank < max(o1, i1):
        shapes |= {"w1a": (o1, rank), "w1b": (rank, i1)}
    else:
        shapes["w1"] = (o1, i1)
    if 2 * rank < max(o2, i2):
        shapes |= {"w2a": (o2, rank), "w2b": (rank, i2 * math.prod(kernel))}
    else:
        shapes["w2"] = (o2, i2, *kernel)
    return shapes


def _matrix(side: Side) -> Tensor:
    """Return W1 or W2, in float32 (float64 stays)."""
    full, a, b, core = side
    return wide(full) if full is not None else wide_product(*_pair(a, b), core)


def _shape(side: Side) -> tuple[int, ...]:
    full, a, b, core = side
    return tuple(full.shape) if full is not None else product_shape(*_pair(a, b), core)


def _svd(side: Side) -> Svd:
    full, a, b, core = side
    if full is not None:
        return matrix_svd(full.double().flatten(1))
    return product_svd(*matrix_factors(*_pair(a, b), core))


def _halves(side: Side) -> tuple[Tensor, Tensor]:
    """Return W1 or W2 as a product [out, r] [r, in·k], in float64; of a matrix one factor is the identity."""
    full, a, b, core = side
    if full is None:
        return matrix_factors(*_pair(a, b), core)
    M = full.detach().double().flatten(1)
    identity = torch.eye(min(M.shape), dtype=M.dtype)
    return (identity, M) if M.shape[0] <= M.shape[1] else (M, identity)


def _pair(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    assert a is not None
    assert b is not None
    return a, b
