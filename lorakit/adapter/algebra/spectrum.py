"""The singular values and directions of an update, from its factors: no [out, in] matrix is built where the update is
of low rank.

    ΔW = L R        L: [out, r]   R: [r, in]        L = Q₁ T₁,  Rᵀ = Q₂ T₂  (QR)        T₁ T₂ᵀ = U' S V'ᵀ  (r x r)
    ΔW = U S Vᵀ     U = Q₁ U': [out, r]   S: [r]   V = Q₂ V': [in, r]

L and R: see `product`. A dense ΔW, or one whose factors have full rank, is decomposed as a matrix. For a DoRA this is
the update it is built on, which needs no base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..update import LowRank, Update
from .product import matrix
from .svd import full_svd, norm_squared, product_svd, random_svd

# Singular values below this share of the largest count as zero: float32 arithmetic leaves that much of a zero one.
ZERO = 1e-6
# Up to this size (smaller side) a matrix gets a full SVD, which takes about a second; a larger one only its
# LARGEST_VALUES largest singular values.
FULL_SVD_MAX_SIZE, LARGEST_VALUES = 1024, 64


@dataclass(frozen=True)
class Spectrum:
    """U [out, r], S [r] (descending), V [in, r] of an update. `norm`: ‖ΔW‖_F; `complete`: whether S has all values;
    `matrices`: how many matrices these are the values of.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    norm: float
    complete: bool = True
    matrices: int = 1

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out)"""
        return self.V.shape[0], self.U.shape[0]

    @property
    def rank(self) -> int:
        """The number of singular values above rounding."""
        return int((ZERO * self.S[0] < self.S).sum()) if self.S.numel() else 0

    @property
    def effective_rank(self) -> float | None:
        """exp(-Σ p log p) with p = σ²/Σσ²: the number of directions that share the energy ‖ΔW‖². Between 1 and the
        rank; 0 if ΔW = 0. Of a stack, all directions over the number of its matrices: matrices without energy count.

        The entropy of Roy and Vetterli (2007), who take p = σ/Σσ; the squares count energy, as the stable rank does.
        None if not all singular values are known.
        """
        if not self.complete:
            return None
        if self.norm == 0:
            return 0.0
        p = (self.S / self.S.norm()).square()
        return math.exp(float(torch.special.entr(p).sum())) / self.matrices

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / σ₁² (Rudelson and Vershynin 2007). Between 1 and the rank; 0 if ΔW = 0. Of a stack, over the
        number of its matrices.
        """
        return (self.norm / float(self.S[0])) ** 2 / self.matrices if self.norm > 0 else 0.0

    def strongest(self, rank: int | None = None) -> Spectrum:
        """Return the first directions: those above rounding, at most `rank`."""
        n = min(self.rank, rank if rank is not None else self.rank)
        return Spectrum(self.U[:, :n], self.S[:n], self.V[:, :n], self.norm, self.complete)


def spectrum(update: Update) -> Spectrum:
    """Return the singular values and directions of one module's update. Of a stack of matrices (experts), the singular
    values of all of them, and no directions: U [out, 0], V [in, 0].
    """
    matrices = update.matrices()
    if matrices is None:
        return decompose(matrix(update))
    each = [decompose(matrix(u)) for u in matrices]
    S = torch.cat([s.S for s in each]).sort(descending=True).values
    size, complete = math.hypot(*(s.norm for s in each)), all(s.complete for s in each)
    return Spectrum(each[0].U[:, :0], S, each[0].V[:, :0], size, complete, len(each))


def decompose(delta: LowRank | Tensor) -> Spectrum:
    """Decompose a product of two thin matrices, or a matrix [out, in·k], into U, S and V, in float64."""
    if isinstance(delta, LowRank):
        svd = product_svd(delta.left, delta.right)
        return Spectrum(svd.U, svd.S, svd.Vt.T, math.sqrt(svd.total))
    norm = math.sqrt(norm_squared(delta))
    complete = min(delta.shape) <= FULL_SVD_MAX_SIZE
    svd = full_svd(delta) if complete else random_svd(delta, LARGEST_VALUES)
    return Spectrum(svd.U.double(), svd.S.double(), svd.Vt.T.double(), norm, complete)
