"""LoHa's update of one module, as a value (Hyeon-Woo et al. 2022, FedPara; LyCORIS, Yeh et al. 2024, section 4).

    ΔW = s · (W1a W1b) ∘ (W2a W2b)        W1a, W2a: [out, r]   W1b, W2b: [r, in·k...]   s = alpha / r

The element-wise (Hadamard) product of two matrices of rank r has a rank of up to r²:

    (L₁ R₁) ∘ (L₂ R₂) = (L₁ ⊙ L₂) (R₁ ⊙ R₂)        ⊙: the Khatri-Rao product, of the rows of L and the columns of R

In Tucker form (convolutions) each of the two is T ×₁ Wa ×₂ Wb with T [r, r, *k], Wa [r, out], Wb [r, in].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import AdapterError
from .checks import check_alpha, check_tensors
from .lora import FactorShapes
from .tucker import matrix_factors, wide_product
from .update import LowRank, Read, Rows, Update


@dataclass(frozen=True)
class Loha(Update):
    w1a: Tensor
    w1b: Tensor
    w2a: Tensor
    w2b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None  # the weight's, where it differs from what the tensors show (kernels)

    @property
    def variant(self) -> str:
        return "loha"

    @property
    def rank(self) -> int:
        return self.w1b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, module: str) -> None:
        check_alpha(module, self.alpha)
        check_tensors(module, self.tensors())
        tucker = (self.t1 is not None, self.t2 is not None)
        for name, a, b, t in (("w1", self.w1a, self.w1b, self.t1), ("w2", self.w2a, self.w2b, self.t2)):
            ranks = (a.shape[0], b.shape[0]) if t is not None else (a.shape[1], b.shape[0])
            expected = tuple(t.shape[:2]) if t is not None else (ranks[1], ranks[1])
            if a.dim() != 2 or b.dim() != 2 or ranks != expected or tucker[0] != tucker[1]:
                core = f" and core {list(t.shape)}" if t is not None else ""
                raise AdapterError(
                    f"adapter factors of '{module}': {name}_a {list(a.shape)} and {name}_b {list(b.shape)}{core} do "
                    "not fit together"
                )

    def times(self, weight: float, module: str) -> Loha:
        """Multiply ΔW: |weight| goes into alpha and the sign into W1a, so that no element is rounded."""
        sign, size = math.copysign(1.0, weight), abs(weight)
        return replace(self, w1a=self.w1a * (sign if size else 0.0), alpha=self.alpha * (size or 1.0))

    def weight_shape(self) -> tuple[int, ...]:
        if self.shape is not None:
            return tuple(self.shape)
        if self.t1 is not None:
            return (self.w1a.shape[1], self.w1b.shape[1], *self.t1.shape[2:])
        return (self.w1a.shape[0], *self.w1b.shape[1:])

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        full = (
            wide_product(self.w1a, self.w1b, self.t1).mul_(wide_product(self.w2a, self.w2b, self.t2)).mul_(self.scale)
        )
        shape = shape or self.shape
        return full.reshape(shape) if shape else full

    def low_rank(self) -> LowRank | None:
        (l1, r1), (l2, r2) = matrix_factors(self.w1a, self.w1b, self.t1), matrix_factors(self.w2a, self.w2b, self.t2)
        if l1.shape[1] * l2.shape[1] >= min(l1.shape[0], r1.shape[1]):
            return None
        left = (l1[:, :, None] * l2[:, None, :]).flatten(1)  # [out, r1·r2]
        right = (r1[:, None, :] * r2[None, :, :]).flatten(0, 1)  # [r1·r2, in·k]
        return LowRank(left * self.scale, right)

    def factor_shapes(self, module: str) -> FactorShapes:
        return FactorShapes.of_shape(self.weight_shape())

    def output_tensors(self) -> dict[str, Tensor] | None:
        return None if self.t1 is not None else {"w1a": self.w1a, "w2a": self.w2a}

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        scale = self.scale * weight

        def change(rows: slice, _: Tensor) -> Tensor:
            first, second = (
                self._part(self.w1a, self.w1b, self.t1, rows, transposed),
                self._part(self.w2a, self.w2b, self.t2, rows, transposed),
            )
            return (first.T if transposed else first).mul_(second.T if transposed else second).mul_(scale)

        return change

    @staticmethod
    def _part(a: Tensor, b: Tensor, t: Tensor | None, rows: slice, transposed: bool) -> Tensor:
        """Return some rows (`transposed`: columns) of one of the two products, [out, in·k]."""
        if transposed:
            b = b[:, rows]
        else:
            a = a[rows] if t is None else a[:, rows]
        return wide_product(a, b, t).flatten(1)
