"""Compute a low-rank update's ΔW for each kind of weight, in full or in blocks of rows.

    linear     weight [out, in]        ΔW = s · B A                      A [r, in]          B [out, r]
    Conv1D     weight [in, out]        ΔW = s · (B A)ᵀ                   (transformers' transposed linear)
    embedding  weight [vocab, dim]     ΔW = s · (B A)ᵀ                   A [r, vocab]       B [dim, r]
    conv       weight [out, in/g, *k]  ΔW = s · (B A) reshaped           A [r, in/g, *k]    B [out, r, 1...]

All in float32 (or float64), so that rounding happens once, when ΔW is added to the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A as [r, -1] and B as [out, r]: contiguous matrices of at least float32, without gradients."""
    wide = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
    return A.detach().to(wide).flatten(1), B.detach().to(wide).flatten(1)


def delta(A: Tensor, B: Tensor, scale: float, shape: torch.Size | tuple[int, ...], transposed: bool = False) -> Tensor:
    """Return ΔW = scale · B A in the weight's shape. `transposed`: for weights stored as [in, out]."""
    down, up = as_matrices(A, B)
    full = down.T @ (up.T * scale) if transposed else (up * scale) @ down
    return full.reshape(shape)


def delta_rows(A: Tensor, B: Tensor, scale: float, rows: slice, transposed: bool = False) -> Tensor:
    """Return some rows of ΔW, flattened to [rows, -1]. The weight's first axis is out, or in (vocab) if transposed."""
    down, up = as_matrices(A, B)
    if transposed:
        return down.T[rows] @ (up.T * scale)
    return (up[rows] * scale) @ down


def row_blocks(shape: torch.Size | tuple[int, ...], most: int = 1 << 22) -> list[slice]:
    """Divide the first axis into slices of about `most` (4 Mi) elements each, so that temporaries stay near 16 MB."""
    if len(shape) == 0 or 0 in shape:
        return []
    per_row = 1
    for size in shape[1:]:
        per_row *= size
    step = max(1, most // per_row)
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
