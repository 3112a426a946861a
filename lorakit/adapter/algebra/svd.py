"""Singular value decompositions of updates: of a low-rank product without forming it, and of a big matrix by random
projection.

    product    B A = (Qb Rb)(Qa Ra)ᵀ = Qb (Rb Raᵀ) Qaᵀ           QR of B [m, r] and Aᵀ [n, r], SVD of an r x r matrix (r
                                                                 ≤ m, n)
    random     Y = W Ω,  Q = orth(Y),  W ≈ Q (Qᵀ W)              Halko, Martinsson and Tropp 2011, algorithms 4.4 and
                                                                 5.1

Cost: (m + n) r² + r³ for the product, where the SVD of the m x n matrix takes m n min(m, n). Everything in float64 for
products. A random one is repeated (subspace iteration) until one more pass over W adds almost nothing; how far it is
from W is then measured, not estimated (`distance`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import wide

# Extra random columns. Halko et al. (section 1.3) call 5 or 10 enough; 10 make the first pass good to a factor of √(1 +
# k/9).
OVERSAMPLE = 10
# Stop when one more pass takes away less than this share of ‖W - W'‖². With it, ranks 4 to 64 of low rank with noise,
# of a slow decay and of plain noise are within 0.2 % of the best error (tests/adapter/test_svd.py). A decaying spectrum
# needs two or three passes.
ACCURACY = 5e-4
MOST_PASSES = 12
# Up to this side the full SVD is faster than random passes, and exact.
SMALL = 192


@dataclass(frozen=True)
class Svd:
    """U [m, k] · diag(S [k]) · Vt [k, n], singular values falling. `total`: ‖W‖² of the whole, of which ΣS² is held."""

    U: Tensor
    S: Tensor
    Vt: Tensor
    total: float

    @property
    def rank(self) -> int:
        """How many singular values are above the rounding of the arithmetic."""
        if not self.S.numel() or not self.S[0] > 0:
            return 0
        rounding = torch.finfo(self.S.dtype).eps * max(self.U.shape[0], self.Vt.shape[1])
        return int((self.S / self.S[0] > rounding).sum())

    def cut(self, rank: int) -> Svd:
        """The first `rank` of them: the best approximation of that rank (Eckart and Young 1936)."""
        return Svd(self.U[:, :rank], self.S[:rank], self.Vt[:rank], self.total)

    def halves(self) -> tuple[Tensor, Tensor]:
        """(B [m, k], A [k, n]) of equal size, B A = W: √S on both sides keeps either half within the range of fp16."""
        root = self.S.sqrt()
        return self.U * root, root[:, None] * self.Vt


def product_core(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Qb [m, r], Rb Raᵀ [r, r] and Qa [n, r] of B A = Qb (Rb Raᵀ) Qaᵀ, with B [m, r] and A [r, n]. In float64."""
    left, R = torch.linalg.qr(B.detach().double())
    right, L = torch.linalg.qr(A.detach().double().T)
    return left, R @ L.T, right


def product_svd(B: Tensor, A: Tensor) -> Svd:
    """The SVD of B A, with B [m, r] and A [r, n], from QR of the halves. In float64."""
    left, core, right = product_core(B, A)
    U, S, Vt = torch.linalg.svd(core, full_matrices=False)
    return Svd(left @ U, S, Vt @ right.T, float(S.square().sum()))


def matrix_svd(
    W: Tensor, rank: int | None = None, keep: float | None = None, *, accuracy: float = ACCURACY, seed: int = 0
) -> Svd:
    """The first singular values of W [m, n]: `rank` of them, or as many as hold the share `keep` of ΣS²; all if neither
    is said.

    Small matrices, and ranks near the full one, by the full SVD; others at random, to `accuracy`.
    """
    W = wide(W)
    side = min(W.shape)
    wanted = side if rank is None and keep is None else min(rank or side, side)
    if side <= SMALL or (keep is None and wanted + OVERSAMPLE > side // 3):
        return _enough(full_svd(W), wanted, keep)
    guess = wanted if keep is None else min(wanted, 32)
    while guess + OVERSAMPLE <= side // 3:
        found = random_svd(W, guess, accuracy=accuracy, seed=seed)
        if keep is None or guess == wanted or float(found.S.double().square().sum()) >= keep * found.total:
            return _enough(found, wanted, keep)
        guess = min(2 * guess, wanted)
    return _enough(full_svd(W), wanted, keep)


def full_svd(W: Tensor) -> Svd:
    """By LAPACK."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return Svd(U, S, Vt, norm_squared(W))


def random_svd(W: Tensor, rank: int, *, accuracy: float = ACCURACY, oversample: int = OVERSAMPLE, seed: int = 0) -> Svd:
    """The first `rank` singular values of W by subspace iteration from a random start."""
    made = torch.Generator(device=W.device).manual_seed(seed)
    columns = min(rank + oversample, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], columns, generator=made, dtype=W.dtype, device=W.device))[0]
    total, held = norm_squared(W), -1.0
    for _ in range(MOST_PASSES):
        right, R = torch.linalg.qr(W.T @ Q)  # W ≈ Q Rᵀ rightᵀ
        U, S, Vt = torch.linalg.svd(R.T, full_matrices=False)
        now = float(S[:rank].double().square().sum())
        if now - held <= max(accuracy * (total - now), torch.finfo(W.dtype).eps * total):
            break
        held = now
        # The best of what this pass found, before the next pass replaces Q.
        best = Svd(Q @ U[:, :rank], S[:rank], Vt[:rank] @ right.T, total)
        Q = torch.linalg.qr(W @ right)[0]
    else:
        return best
    return Svd(Q @ U[:, :rank], S[:rank], Vt[:rank] @ right.T, total)


def needed(S: Tensor, total: float, keep: float) -> int:
    """How many of the singular values hold the share `keep` of `total`; at least one, and all if they never do."""
    held = S.double().square().cumsum(0)
    # keep=1 must not ask for what rounding alone has taken away.
    enough = held >= keep * total * (1 - 1e-14) if keep < 1 else held >= float(held[-1])
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else len(S)


def distance(W: Tensor, B: Tensor, A: Tensor, block: int = 1024) -> float:
    """‖W - B A‖² (Frobenius), some rows at a time, without the cancellation that ‖W‖² - ΣS² has."""
    rows = range(0, W.shape[0], block)
    return sum(norm_squared(wide(W[i : i + block]) - (B[i : i + block] @ A).to(wide(W[:1]).dtype)) for i in rows)


def norm_squared(W: Tensor) -> float:
    """‖W‖² (Frobenius), row by row and then in float64: within 1e-8 of it, and a hundred times faster than all in
    float64.
    """
    W = wide(W.flatten(1) if W.dim() > 1 else W[None])
    return float(torch.linalg.vector_norm(W if W.is_contiguous() else W.T, dim=1).double().square().sum())


def _enough(found: Svd, rank: int, keep: float | None) -> Svd:
    return found.cut(min(rank, needed(found.S, found.total, keep)) if keep is not None else rank)
