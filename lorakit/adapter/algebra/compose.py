"""Singular values as low-rank factors again, and how far those are from the update they stand for.

B A = ΔW / s        both halves of equal size: √S on either side, so that neither leaves the range of fp16
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.delta import as_matrices
from ...ops.packed import expand_packed
from ..checks import narrowed
from ..lora import Factors, Form
from ..update import Update
from .product import norm
from .svd import Svd, distance


def compose(
    form: Form,
    cuts: Sequence[Svd],
    rank: int,
    scale: float = 1.0,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Low-rank factors out of singular values (one SVD, or one for each adapted part); a shorter SVD is padded with
    zeros.
    """
    pairs = [_padded(*cut.cut(rank).halves(), rank) for cut in cuts]
    root = 1 / math.sqrt(scale)
    A = narrowed(torch.cat([A * root for _, A in pairs]), dtype, "the factor A of a cut update")
    Bs = [narrowed(B * root, dtype, "the factor B of a cut update") for B, _ in pairs]
    B = expand_packed(torch.stack(Bs), form.parts) if form.parts else Bs[0]
    return form.factors(B, A, scale * (math.sqrt(rank) if rslora else rank), rslora)


def difference(before: Update, after: Factors) -> float:
    """‖ΔW - ΔW'‖ (Frobenius): by QR of the halves where ΔW is such a product, with ΔW itself only where it is not."""
    A, B = as_matrices(after.A, after.B)
    found = before.low_rank()
    if found is None:
        return math.sqrt(distance(before.matrix(), B * after.scale, A))
    # ‖B A‖ = ‖Rb Raᵀ‖. (BᵀB) ∘ (A Aᵀ) would lose what is below 1e-8 of ΔW to cancellation.
    left = torch.cat([found.left, B.double() * -after.scale], 1)
    right = torch.cat([found.right, A.double()])
    Rb, Ra = (torch.linalg.qr(t, mode="r")[1] for t in (left, right.T))
    return float(torch.linalg.matrix_norm(Rb @ Ra.T))


def relative(before: Update, after: Factors) -> tuple[float, float]:
    """(‖ΔW - ΔW'‖ / ‖ΔW‖, ‖ΔW‖)."""
    size = norm(before)
    return (difference(before, after) / size if size else 0.0), size


def _padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    short = rank - B.shape[1]
    if short <= 0:
        return B, A
    return torch.nn.functional.pad(B, (0, short)), torch.nn.functional.pad(A, (0, 0, 0, short))
