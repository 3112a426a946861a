"""The singular values and directions of an update, from its factors: no [out, in] matrix is built where the update is of low rank.

    ΔW = L R        L: [out, r]   R: [r, in]        L = Q₁ T₁,  Rᵀ = Q₂ T₂  (QR)        T₁ T₂ᵀ = U' S V'ᵀ  (r x r)
    ΔW = U S Vᵀ     U = Q₁ U': [out, r]   S: [r]   V = Q₂ V': [in, r]

ΔW is meant as the layer uses it, outputs in rows and inputs in columns: [out, in], a convolution's [out, in/g·k], an embedding's
[dim, vocab]. LoHa and LoKr are low-rank products too, by the rules of the Khatri-Rao and the Kronecker product, of ranks r² and up;
where such a rank is no smaller than the matrix, and for a whole ΔW, the matrix itself is taken.

Of a DoRA this is s · B A, the part of its change that needs no base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Other
from .dense import Dense
from .factors import Factors
from .hadamard import Hadamard
from .kronecker import Kronecker
from .svd import full_svd, norm_squared, product_core, product_svd, random_svd

# A singular value below this part of the largest is taken for zero: what float32 arithmetic leaves of a direction that is not there.
ZERO = 1e-6
# Up to here (smaller side) a whole matrix is decomposed, which takes about a second; of a larger one, the strongest directions.
WHOLE, STRONGEST = 1024, 64
# A whole matrix up to here is in float64, a larger one in float32, for memory.
DOUBLE = 1 << 22


@dataclass(frozen=True)
class LowRank:
    left: Tensor  # [out, r]
    right: Tensor  # [r, in]


@dataclass(frozen=True)
class Spectrum:
    """U [out, r], S [r] (descending), V [in, r] of an update; `norm` is ‖ΔW‖_F. `complete`: whether all directions are here."""

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
        """exp(-Σ p log p) with p = σ²/Σσ²: how many directions share the energy ‖ΔW‖². Between 1 and the rank; 0 if ΔW = 0.

        The entropy of Roy and Vetterli (2007), who take p = σ/Σσ; the squares count energy, as the stable rank does. None if not all
        singular values are known.
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


def spectrum(update: Factors | Other) -> Spectrum:
    """The singular values and directions of one module's update."""
    return decompose(matrix(update))


def norm(update: Factors | Other) -> float:
    """‖ΔW‖_F."""
    found = matrix(update)
    if isinstance(found, LowRank):
        return float(torch.linalg.matrix_norm(product_core(found.left, found.right)[1]))
    return float(torch.linalg.vector_norm(found, dtype=torch.float64))


def decompose(found: LowRank | Tensor) -> Spectrum:
    """U, S, V of a product of two thin matrices, or of a matrix."""
    if isinstance(found, LowRank):
        whole = product_svd(found.left, found.right)
        return Spectrum(whole.U, whole.S, whole.Vt.T, math.sqrt(whole.total))
    size = math.sqrt(norm_squared(found))
    complete = min(found.shape) <= WHOLE
    some = full_svd(found) if complete else random_svd(found, STRONGEST)
    return Spectrum(some.U.double(), some.S.double(), some.Vt.T.double(), size, complete)


def matrix(update: Factors | Other) -> LowRank | Tensor:
    """ΔW as the product of two thin matrices where it is one, else whole."""
    if isinstance(update, Factors):
        return _of_factors(update)
    if isinstance(update, Hadamard):
        return _of_hadamard(update)
    if isinstance(update, Kronecker):
        return _of_kronecker(update)
    return _of_dense(update)


def inner(a: LowRank | Tensor, b: LowRank | Tensor) -> float:
    """⟨a, b⟩ = Σ a·b over all numbers; of two products through r x r matrices."""
    if isinstance(a, LowRank):
        if isinstance(b, LowRank):
            return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())
        return float((a.left.to(b.dtype) * (b @ a.right.T.to(b.dtype))).sum())
    if isinstance(b, LowRank):
        return inner(b, a)
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a.split(256), b.split(256), strict=True)))


def size_of(found: LowRank | Tensor) -> tuple[int, int]:
    """(out, in)."""
    return (found.left.shape[0], found.right.shape[1]) if isinstance(found, LowRank) else (found.shape[0], found.shape[1])


def _of_factors(f: Factors) -> LowRank:
    A, B = f.A.detach().double().flatten(1), f.B.detach().double().flatten(1)
    if A.shape[0] != B.shape[1]:  # PEFT's grouped convolution: each group of outputs reads its own rows of A
        B = torch.block_diag(*B.chunk(f.groups))
    return LowRank(B * f.scale, A)


def _of_hadamard(h: Hadamard) -> LowRank | Tensor:
    """(L₁ R₁) ∘ (L₂ R₂) = (L₁ ⊙ L₂)(R₁ ⊙ R₂): rows of L, and columns of R, multiplied each with each (Khatri-Rao)."""
    (l1, r1), (l2, r2) = _pair(h.w1a, h.w1b, h.t1), _pair(h.w2a, h.w2b, h.t2)
    if l1.shape[1] * l2.shape[1] >= min(l1.shape[0], r1.shape[1]):
        return _sized((l1 @ r1) * (l2 @ r2) * h.scale)
    left = (l1[:, :, None] * l2[:, None, :]).flatten(1)  # [out, r1·r2]
    right = (r1[:, None, :] * r2[None, :, :]).flatten(0, 1)  # [r1·r2, in]
    return LowRank(left * h.scale, right)


def _of_kronecker(k: Kronecker) -> LowRank | Tensor:
    """(L₁ R₁) ⊗ (L₂ R₂) = (L₁ ⊗ L₂)(R₁ ⊗ R₂)."""
    (l1, r1), (l2, r2) = _half(k.w1, k.w1a, k.w1b), _half(k.w2, k.w2a, k.w2b, k.t2)
    if l1.shape[1] * l2.shape[1] >= min(l1.shape[0] * l2.shape[0], r1.shape[1] * r2.shape[1]):
        return _sized(torch.kron(l1 @ r1, l2 @ r2) * k.scale)
    return LowRank(torch.kron(l1, l2) * k.scale, torch.kron(r1, r2))


def _of_dense(d: Dense) -> Tensor:
    weight = d.weight if d.weight is not None else torch.zeros(1, 1)  # a change of the bias alone
    return _sized(weight.detach().flatten(1) if weight.dim() > 1 else weight.detach()[:, None])


def _half(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if whole is None:
        assert a is not None
        assert b is not None
        return _pair(a, b, core)
    M = whole.detach().double().flatten(1)
    rows, columns = M.shape
    one = torch.eye(min(rows, columns), dtype=M.dtype)
    return (one, M) if rows <= columns else (M, one)


def _pair(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """[out, r] and [r, in·k] of a product, also in Tucker form."""
    a, b = a.detach().double(), b.detach().double()
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T.contiguous(), torch.einsum("ij...,jn->in...", core.detach().double(), b).flatten(1)


def _sized(M: Tensor) -> Tensor:
    return M.to(torch.float64 if M.numel() <= DOUBLE else torch.float32)
