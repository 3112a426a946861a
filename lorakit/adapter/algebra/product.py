"""ΔW as the product of two thin matrices, L R with L [out, r] and R [r, in], where it is one; else the matrix itself.

ΔW is meant as the layer uses it: outputs in rows, inputs in columns (a convolution's [out, in/g·k], an embedding's
[dim, vocab]). Where the rank of such a product is no smaller than the matrix, and for a whole ΔW, the matrix itself is
taken. Of a DoRA this is s · B A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..update import LowRank, Update
from .svd import product_core

# A whole matrix up to here is in float64, a larger one in float32, for memory.
DOUBLE = 1 << 22


def matrix(update: Update) -> LowRank | Tensor:
    """ΔW as the product of two thin matrices where it is one, else whole."""
    own = update.without_base()
    found = own.low_rank()
    if found is not None:
        return found
    full = own.map(lambda _, t: t.detach().double()).matrix()
    return full if full.numel() <= DOUBLE else full.float()


def norm(update: Update) -> float:
    """‖ΔW‖_F."""
    found = matrix(update)
    if isinstance(found, LowRank):
        return float(torch.linalg.matrix_norm(product_core(found.left, found.right)[1]))
    return float(torch.linalg.vector_norm(found, dtype=torch.float64))


def inner(a: LowRank | Tensor, b: LowRank | Tensor) -> float:
    """⟨a, b⟩ = Σ a·b over all elements; of two products through r x r matrices."""
    if isinstance(a, LowRank):
        if isinstance(b, LowRank):
            return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())
        return float((a.left.to(b.dtype) * (b @ a.right.T.to(b.dtype))).sum())
    if isinstance(b, LowRank):
        return inner(b, a)
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a.split(256), b.split(256), strict=True)))


def size_of(found: LowRank | Tensor) -> tuple[int, int]:
    """(out, in)."""
    return (
        (found.left.shape[0], found.right.shape[1]) if isinstance(found, LowRank) else (found.shape[0], found.shape[1])
    )
