"""Convert low-rank factors with a block structure between their compact form and a plain pair of matrices.

A packed projection with n adapted parts is one update of rank n·r whose B is zero outside n blocks; a grouped
convolution with an A shared by its g groups is, in PEFT's ungrouped form, one of rank g·r whose A is zero outside g
blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand_packed(B: Tensor, parts: tuple[bool, ...]) -> Tensor:
    """Expand B [n, out/parts, r] to [out, n·r]: each adapted part's block at its rows, zero elsewhere."""
    n, size, rank = B.shape
    full = B.new_zeros(len(parts), size, n, rank)
    full[[i for i, adapted in enumerate(parts) if adapted], :, torch.arange(n)] = B
    return full.reshape(len(parts) * size, n * rank)


def compact_packed(B: Tensor, parts: tuple[bool, ...]) -> Tensor | None:
    """Reverse `expand_packed`; None if B [out, n·r] does not have that form."""
    n = sum(parts)
    if B.shape[1] % n or B.shape[0] % len(parts):
        return None
    blocks = B.reshape(len(parts), B.shape[0] // len(parts), n, B.shape[1] // n)
    compact = blocks[[i for i, adapted in enumerate(parts) if adapted], :, torch.arange(n)]
    return compact if torch.equal(expand_packed(compact, parts), B) else None


def group_blocks(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """Convert PEFT's grouped factors (A [r, in, *k], B [out, r/g, 1...]) to ours, with one A for all groups.

    None if the groups have different A.
    """
    rank, size_in = A.shape[0] // groups, A.shape[1] // groups
    blocks = A.reshape(groups, rank, groups, size_in, *A.shape[2:])
    shared = blocks[0, :, 0]
    return (shared.contiguous(), B) if torch.equal(ungroup(shared, groups), A) else None


def ungroup(A: Tensor, groups: int) -> Tensor:
    """Expand our A [r, in/g, *k] to PEFT's A [g·r, in, *k]: a copy for each group's inputs, zero elsewhere."""
    rank, size_in = A.shape[:2]
    full = A.new_zeros(groups, rank, groups, size_in, *A.shape[2:])
    for g in range(groups):
        full[g, :, g] = A
    return full.reshape(groups * rank, groups * size_in, *A.shape[2:])
