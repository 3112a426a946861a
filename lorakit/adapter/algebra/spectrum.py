"""The singular values and directions of an update, from its factors: no [out, in] matrix is built where the update is
of low rank.

    ΔW = L R        L: [out, r]   R: [r, in]        L = Q₁ T₁,  Rᵀ = Q₂ T₂  (QR)        T₁ T₂ᵀ = U' S V'ᵀ  (r x r)
    ΔW = U S Vᵀ     U = Q₁ U': [out, r]   S: [r]   V = Q₂ V': [in, r]

L and R: see `product`; a whole ΔW, and what is of no smaller rank than the matrix, is decomposed itself.
Of a DoRA this is s · B A, the part of its change that needs no base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..update import LowRank, Update
from .product import matrix
from .svd import full_svd, norm_squared, product_svd, random_svd

# A singular value below this part of the largest is taken for zero: what float32 arithmetic leaves of a direction that
# is not there.
ZERO = 1e-6
# Up to here (smaller side) a whole matrix is decomposed, which takes about a second; of a larger one, the strongest
# directions.
WHOLE, STRONGEST = 1024, 64


@dataclass(frozen=True)
class Spectrum:
    """U [out, r], S [r] (descending), V [in, r] of an update; `norm` is ‖ΔW‖_F. `complete`: whether all directions are
    here.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    norm: float
    complete: bool = True

    @property
    def rank(self) -> int:
        """How many directions are more than rounding."""
        return int((ZERO * self.S[0] < self.S).sum()) if self.S.numel() else 0

    @property
    def effective_rank(self) -> float | None:
        """exp(-Σ p log p) with p = σ²/Σσ²: how many directions share the energy ‖ΔW‖². Between 1 and the rank; 0 if ΔW
        = 0.

        The entropy of Roy and Vetterli (2007), who take p = σ/Σσ; the squares count energy, as the stable rank does.
        None if not all singular values are known.
        """
        if not self.complete:
            return None
        if self.norm == 0:
            return 0.0
        p = (self.S / self.S.norm()).square()
        return math.exp(float(torch.special.entr(p).sum()))

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / σ₁² (Rudelson and Vershynin 2007). Between 1 and the rank; 0 if ΔW = 0."""
        return (self.norm / float(self.S[0])) ** 2 if self.norm > 0 else 0.0

    def strongest(self, rank: int | None = None) -> Spectrum:
        """The first directions alone: those that are more than rounding, or the first `rank` of them."""
        n = min(self.rank, rank if rank is not None else self.rank)
        return Spectrum(self.U[:, :n], self.S[:n], self.V[:, :n], self.norm, self.complete)


def spectrum(update: Update) -> Spectrum:
    """The singular values and directions of one module's update."""
    return decompose(matrix(update))


def decompose(found: LowRank | Tensor) -> Spectrum:
    """U, S, V of a product of two thin matrices, or of a matrix."""
    if isinstance(found, LowRank):
        whole = product_svd(found.left, found.right)
        return Spectrum(whole.U, whole.S, whole.Vt.T, math.sqrt(whole.total))
    size = math.sqrt(norm_squared(found))
    complete = min(found.shape) <= WHOLE
    some = full_svd(found) if complete else random_svd(found, STRONGEST)
    return Spectrum(some.U.double(), some.S.double(), some.Vt.T.double(), size, complete)
