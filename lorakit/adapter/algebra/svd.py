"""Singular value decompositions of updates: of a low-rank product without forming it, of a large matrix randomized.

    product    B A = (Qb Rb)(Qa Ra)ᵀ = Qb (Rb Raᵀ) Qaᵀ    QR of B [m, r] and Aᵀ [n, r], SVD of an r x r matrix
    random     Y = W Ω,  Q = orth(Y),  W ≈ Q (Qᵀ W)       Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1

Cost: (m + n) r² + r³ for the product, against m n min(m, n) for the SVD of the m x n matrix. Products are computed in
float64. The randomized SVD repeats (subspace iteration) until another pass over W adds almost nothing; `distance` then
measures its error on W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import wide

# Extra random columns. Halko et al. (section 1.3): 5 or 10 are enough. With 10 the error of the first pass is within a
# factor of √(1 + k/9) of the best.
OVERSAMPLE = 10
# Stop when another pass reduces ‖W - W'‖² by less than this share. Ranks 4 to 64 are then within 0.2 % of the best
# error for low rank with noise, a slow decay and plain noise (tests/adapter/algebra/test_svd.py); a decaying spectrum
# takes two or three passes.
ACCURACY = 5e-4
MAX_PASSES = 12
# Up to this size (smaller side) the full SVD is faster than random passes, and exact.
FULL_SVD_FASTER_UP_TO = 192


@dataclass(frozen=True)
class Svd:
    """U [m, k] · diag(S [k]) · Vt [k, n], S descending. `total`: ‖W‖²_F, of which ΣS² is in these k values."""

    U: Tensor
    S: Tensor
    Vt: Tensor
    total: float

    @property
    def rank(self) -> int:
        """The number of singular values above the rounding of the arithmetic."""
        if not self.S.numel() or not self.S[0] > 0:
            return 0
        rounding = torch.finfo(self.S.dtype).eps * max(self.U.shape[0], self.Vt.shape[1])
        return int((self.S / self.S[0] > rounding).sum())

    def cut(self, rank: int) -> Svd:
        """Return the first `rank` singular values: the best approximation of that rank (Eckart and Young 1936)."""
        return Svd(self.U[:, :rank], self.S[:rank], self.Vt[:rank], self.total)

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return (B [m, k], A [k, n]) with B A = W. √S on both sides keeps both within the range of fp16."""
        root = self.S.sqrt()
        return self.U * root, root[:, None] * self.Vt


def product_core(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Qb [m, r], Rb Raᵀ [r, r] and Qa [n, r] of B A = Qb (Rb Raᵀ) Qaᵀ, in float64. B: [m, r], A: [r, n]."""
    left, R = torch.linalg.qr(B.detach().double())
    right, L = torch.linalg.qr(A.detach().double().T)
    return left, R @ L.T, right


def product_svd(B: Tensor, A: Tensor) -> Svd:
    """Return the SVD of B A, with B [m, r] and A [r, n], from a QR of B and Aᵀ. In float64."""
    left, core, right = product_core(B, A)
    U, S, Vt = torch.linalg.svd(core, full_matrices=False)
    return Svd(left @ U, S, Vt @ right.T, float(S.square().sum()))


def matrix_svd(
    W: Tensor, rank: int | None = None, keep: float | None = None, *, accuracy: float = ACCURACY, seed: int = 0
) -> Svd:
    """Return the first singular values of W [m, n]: at most `rank`, and as many as hold the share `keep` of ΣS²; all if
    neither is given.

    Small matrices, and ranks near the full one, by the full SVD; others by the randomized SVD, to `accuracy`.
    """
    W = wide(W)
    side = min(W.shape)
    most = side if rank is None and keep is None else min(rank or side, side)
    if side <= FULL_SVD_FASTER_UP_TO or (keep is None and most + OVERSAMPLE > side // 3):
        return _truncated(full_svd(W), most, keep)
    guess = most if keep is None else min(most, 32)
    while guess + OVERSAMPLE <= side // 3:
        svd = random_svd(W, guess, accuracy=accuracy, seed=seed)
        if keep is None or guess == most or float(svd.S.double().square().sum()) >= keep * svd.total:
            return _truncated(svd, most, keep)
        guess = min(2 * guess, most)
    return _truncated(full_svd(W), most, keep)


def full_svd(W: Tensor) -> Svd:
    """Return all singular values of W [m, n], by LAPACK, in W's dtype."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return Svd(U, S, Vt, norm_squared(W))


def random_svd(W: Tensor, rank: int, *, accuracy: float = ACCURACY, oversample: int = OVERSAMPLE, seed: int = 0) -> Svd:
    """Return the first `rank` singular values of W [m, n], by subspace iteration from a random start (`seed`).

    Iterates until a pass reduces ‖W - W'‖² by less than the share `accuracy`.
    """
    generator = torch.Generator(device=W.device).manual_seed(seed)
    columns = min(rank + oversample, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], columns, generator=generator, dtype=W.dtype, device=W.device))[0]
    total, before = norm_squared(W), -1.0
    for _ in range(MAX_PASSES):
        right, R = torch.linalg.qr(W.T @ Q)  # W ≈ Q Rᵀ rightᵀ
        U, S, Vt = torch.linalg.svd(R.T, full_matrices=False)
        now = float(S[:rank].double().square().sum())
        if now - before <= max(accuracy * (total - now), torch.finfo(W.dtype).eps * total):
            break
        before = now
        # The result of this pass, before the next one replaces Q.
        best = Svd(Q @ U[:, :rank], S[:rank], Vt[:rank] @ right.T, total)
        Q = torch.linalg.qr(W @ right)[0]
    else:
        return best
    return Svd(Q @ U[:, :rank], S[:rank], Vt[:rank] @ right.T, total)


def needed(S: Tensor, total: float, keep: float) -> int:
    """Return the number of singular values S [k] (descending) whose squares sum to the share `keep` of `total` = ‖W‖²:
    at least one; all k if they are too few.
    """
    energy = S.double().square().cumsum(0)
    # keep=1: rounding alone may leave Σσ² below the total.
    enough = energy >= keep * total * (1 - 1e-14) if keep < 1 else energy >= float(energy[-1])
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else len(S)


def distance(W: Tensor, B: Tensor, A: Tensor, block: int = 1024) -> float:
    """Return ‖W - B A‖² (Frobenius), `block` rows at a time, of W [m, n], B [m, r], A [r, n].

    ‖W‖² - ΣS² would suffer from cancellation.
    """
    rows = range(0, W.shape[0], block)
    return sum(norm_squared(wide(W[i : i + block]) - (B[i : i + block] @ A).to(wide(W[:1]).dtype)) for i in rows)


def norm_squared(W: Tensor) -> float:
    """Return ‖W‖² (Frobenius): row norms in W's dtype, added up in float64. Within 1e-8, and a hundred times as fast as
    all of it in float64.
    """
    W = wide(W.flatten(1) if W.dim() > 1 else W[None])
    return float(torch.linalg.vector_norm(W if W.is_contiguous() else W.T, dim=1).double().square().sum())


def _truncated(svd: Svd, rank: int, keep: float | None) -> Svd:
    return svd.cut(min(rank, needed(svd.S, svd.total, keep)) if keep is not None else rank)
