"""LoRA's update of one weight of a mixture of experts, as a value: factors of each expert.

    ΔW[e] = s · B[e] A[e]        W: [E, out, in], or [E, in, out] if transposed   A: [E, r, in]   B: [E, out, r]

The weight is a parameter of its own, whose name is the module name in an adapter (`...mlp.experts.down_proj`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import EXPERTS, MAX_RANK, scale_of
from ..errors import AdapterError
from .algebra.svd import Svd, product_svd
from .checks import check_alpha, check_tensors, wide
from .lora import Factors, FactorShapes
from .update import Read, Rows, Update


@dataclass(frozen=True)
class ExpertFactors(Update):
    """`transposed`: the weight is stored as [E, in, out] (gpt-oss). The shape decides, unless out = in."""

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False
    transposed: bool = False

    @property
    def variant(self) -> str:
        return EXPERTS

    @property
    def rank(self) -> int:
        """The rank of one expert's update."""
        return self.A.shape[1]

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    @property
    def has_factors(self) -> bool:
        return True

    @property
    def experts(self) -> int:
        """The number of experts, E."""
        return self.A.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        return self.B.shape[1], self.A.shape[2]

    def weight_name(self, module: str) -> str:
        return module

    def of_expert(self, expert: int) -> Factors:
        """Return one expert's update, of a weight [out, in]."""
        return Factors(self.A[expert], self.B[expert], self.alpha, "linear", self.rslora, self.transposed)

    def check(self, module: str) -> None:
        check_tensors(module, self.tensors(), 3)
        check_alpha(module, self.alpha)
        A, B = list(self.A.shape), list(self.B.shape)
        if len(A) != 3 or len(B) != 3 or A[0] != B[0] or A[1] != B[2]:
            raise AdapterError(
                f"adapter factors of '{module}': A {A} and B {B}; expected [experts, r, in] and [experts, out, r]"
            )
        if self.rank > MAX_RANK:
            raise AdapterError(
                f"adapter factors of '{module}': rank {self.rank} is beyond the largest sensible rank, {MAX_RANK}"
            )

    def times(self, weight: float, module: str) -> ExpertFactors:
        """Multiply ΔW: |weight| goes into alpha and the sign into B, so that no element is rounded."""
        if not weight:
            return replace(self, B=torch.zeros_like(self.B))
        return replace(self, B=self.B if weight > 0 else -self.B, alpha=self.alpha * abs(weight))

    # ΔW by itself

    def weight_shape(self) -> tuple[int, ...]:
        out, inner = self.sizes
        return (self.experts, inner, out) if self.transposed else (self.experts, out, inner)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return ΔW in float32 (float64 stays): [E, out, in], or [E, in, out] if transposed."""
        full = self._product(slice(None), self.scale, self.transposed)
        return full if shape is None else full.reshape(shape)

    def singular_values(self, rank: int | None = None, keep: float | None = None) -> list[Svd]:
        """Return the SVD of each expert's ΔW."""
        return [product_svd(B * self.scale, A) for A, B in zip(wide(self.A), wide(self.B), strict=True)]

    def matrices(self) -> tuple[Factors, ...]:
        """Return each expert's update, of a weight [out, in]."""
        return tuple(self.of_expert(e) for e in range(self.experts))

    def of_matrices(self, updates: Sequence[Update]) -> ExpertFactors:
        """Stack the experts' factors; the ranks are padded to the largest."""
        found = [u.factors for u in updates]
        factors = [f for f in found if f is not None and f.A.dim() == 2]
        if len(factors) != self.experts or len({f.sizes for f in factors}) > 1:
            raise AdapterError(f"{len(updates)} updates make no stack of {self.experts} experts of one size")
        return ExpertFactors.of_experts(factors, self.transposed)

    @classmethod
    def of_experts(cls, factors: Sequence[Factors], transposed: bool) -> ExpertFactors:
        """Stack the factors of all experts, of one size each; the ranks are padded to the largest."""
        rank, scale = max(f.rank for f in factors), factors[0].scale
        if any(f.scale != scale for f in factors):
            factors = [replace(f, B=(f.B * f.scale).to(f.B.dtype), alpha=float(f.rank), rslora=False) for f in factors]
            scale = 1.0
        A = torch.stack([F.pad(f.A, (0, 0, 0, rank - f.rank)) for f in factors])
        B = torch.stack([F.pad(f.B, (0, rank - f.rank)) for f in factors])
        return cls(A, B, scale * rank, False, transposed)

    def factor_shapes(self, module: str) -> FactorShapes:
        """Raise AdapterError: each of its `matrices` has shapes of its own."""
        raise AdapterError(f"'{module}' has factors for each of {self.experts} experts, and no factors as a whole")

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        (out, inner), E = self.sizes, self.experts
        plain, transposed = (E, out, inner), (E, inner, out)
        if shape == plain == transposed:
            return self.transposed or conv1d
        return False if shape == plain else True if shape == transposed else None

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        """Compute ΔW by blocks of experts, the first axis of the stored weight."""
        scale = self.scale * weight
        return lambda rows, _: self._product(rows, scale, transposed).flatten(1)

    def _product(self, experts: slice, scale: float, transposed: bool) -> Tensor:
        A, B = wide(self.A[experts]), wide(self.B[experts]) * scale
        return torch.bmm(A.mT, B.mT) if transposed else torch.bmm(B, A)
