"""Low-rank factors out of an SVD of ΔW, and how far they are from ΔW.

B A = ΔW / s        B = U √S, A = √S Vᵀ (over √s each): of equal size, so that neither leaves the range of fp16
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.delta import as_matrices
from ...ops.packed import expand_packed
from ..checks import narrowed
from ..lora import Factors, FactorShapes
from ..update import Update
from .product import norm
from .svd import Svd, distance


def compose(
    shapes: FactorShapes,
    svds: Sequence[Svd],
    rank: int,
    scale: float = 1.0,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Build factors of rank `rank` from one SVD, or one for each adapted part; shorter SVDs are zero-padded.

    scale: the alpha / rank of the result (with rslora alpha / √rank). Raises AdapterError if `dtype` cannot hold the
    values.
    """
    pairs = [_padded(*svd.cut(rank).halves(), rank) for svd in svds]
    root = 1 / math.sqrt(scale)
    A = narrowed(torch.cat([A * root for _, A in pairs]), dtype, "the factor A of a truncated update")
    Bs = [narrowed(B * root, dtype, "the factor B of a truncated update") for B, _ in pairs]
    B = expand_packed(torch.stack(Bs), shapes.parts) if shapes.parts else Bs[0]
    return shapes.factors(B, A, scale * (math.sqrt(rank) if rslora else rank), rslora)


def difference(before: Update, after: Factors) -> float:
    """Return ‖ΔW - ΔW'‖ (Frobenius), from a QR of the factors where ΔW has any, else from ΔW itself."""
    A, B = as_matrices(after.A, after.B)
    low = before.low_rank()
    if low is None:
        return math.sqrt(distance(before.matrix(), B * after.scale, A))
    # ‖B A‖ = ‖Rb Raᵀ‖. (BᵀB) ∘ (A Aᵀ) would lose differences below 1e-8 of ΔW to cancellation.
    left = torch.cat([low.left, B.double() * -after.scale], 1)
    right = torch.cat([low.right, A.double()])
    Rb, Ra = (torch.linalg.qr(t, mode="r")[1] for t in (left, right.T))
    return float(torch.linalg.matrix_norm(Rb @ Ra.T))


def relative(before: Update, after: Factors) -> tuple[float, float]:
    """Return (‖ΔW - ΔW'‖ / ‖ΔW‖, ‖ΔW‖), both Frobenius; the first is 0 if ΔW = 0."""
    size = norm(before)
    return (difference(before, after) / size if size else 0.0), size


def _padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    short = rank - B.shape[1]
    if short <= 0:
        return B, A
    return torch.nn.functional.pad(B, (0, short)), torch.nn.functional.pad(A, (0, 0, 0, short))
