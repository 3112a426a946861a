"""ΔW as a product of two thin matrices L [out, r] and R [r, in], or as a matrix where it has no such factors.

Outputs are rows and inputs columns, as the layer uses ΔW: a convolution's is [out, in/g·k], an embedding's [dim,
vocab]. Dense updates, and those whose factors have full rank, are given as a matrix. For a DoRA this is the update it
is built on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..update import LowRank, Update
from .svd import product_core

# Matrices of up to this many elements are in float64, larger ones in float32 to save memory.
FLOAT64_MAX_ELEMENTS = 1 << 22


def matrix(update: Update) -> LowRank | Tensor:
    """Return ΔW as a product of two thin matrices in float64, or as a matrix [out, in·k]."""
    own = update.without_base()
    low = own.low_rank()
    if low is not None:
        return low
    full = own.map(lambda _, t: t.detach().double()).matrix()
    return full if full.numel() <= FLOAT64_MAX_ELEMENTS else full.float()


def separate(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return the updates with those of stacks of matrices (experts) taken apart: "name.3" for the fourth matrix."""
    found: dict[str, Update] = {}
    for module, update in updates.items():
        matrices = update.matrices()
        found |= {module: update} if matrices is None else {f"{module}.{i}": u for i, u in enumerate(matrices)}
    return found


def norm(update: Update) -> float:
    """Return ‖ΔW‖_F of an update, without forming ΔW where it is a product of thin matrices."""
    matrices = update.matrices()
    if matrices is not None:
        return math.hypot(*map(norm, matrices))
    delta = matrix(update)
    if isinstance(delta, LowRank):
        return float(torch.linalg.matrix_norm(product_core(delta.left, delta.right)[1]))
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64))


def inner(a: LowRank | Tensor, b: LowRank | Tensor) -> float:
    """Return ⟨a, b⟩ = Σ a·b over all elements; for two products from r x r matrices, without forming them."""
    if isinstance(a, LowRank):
        if isinstance(b, LowRank):
            return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())
        return float((a.left.to(b.dtype) * (b @ a.right.T.to(b.dtype))).sum())
    if isinstance(b, LowRank):
        return inner(b, a)
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a.split(256), b.split(256), strict=True)))


def size_of(delta: LowRank | Tensor) -> tuple[int, int]:
    """Return (out, in·k)."""
    return (
        (delta.left.shape[0], delta.right.shape[1]) if isinstance(delta, LowRank) else (delta.shape[0], delta.shape[1])
    )
