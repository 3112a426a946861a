"""An update of a fused weight as updates of its parts, and back: kohya's `attn_qkv` is diffusers' `to_q`, `to_k`,
`to_v`.

    W = [W1; W2; ...]     the parts are blocks of rows        ΔW = B A:  ΔWi = Bi A
                          LoHa: rows of W1a and W2a           LoKr: rows of W1

Splitting is exact and keeps rank and alpha: each part has the fused A. Fusing parts that share what is not rows gives
the fused tensors back, bit for bit. Update low-rank parts, and some parts without the others, are fused as blocks, A =
[A1; A2; ...] and B block-diagonal, the ranks added; such blocks (sd-scripts' split_qkv trains them too) are told and
split into parts of their own ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapter.checks import wide
from ..adapter.dense import Dense
from ..adapter.loha import Hadamard
from ..adapter.lokr import Kronecker
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..errors import AdapterError

_ROWS = {Factors: ("B", "magnitude"), Hadamard: ("w1a", "w2a"), Kronecker: ("w1", "w1a"), Dense: ("weight", "bias")}


def size(update: Update) -> tuple[int, int]:
    """(out, in) of the weight it changes, a convolution's in without its kernel where the tensors tell it."""
    if isinstance(update, Factors):
        return update.B.shape[0], update.A.shape[1]
    if not update.changes_weight:
        return update.tensors()["bias"].shape[0], 1
    out, inner = (*update.weight_shape(), 1)[:2]
    return out, inner


def _sides(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None = None) -> tuple[int, int]:
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    assert a is not None
    assert b is not None
    return a.shape[1 if core is not None else 0], b.shape[1]


def part_sizes(total: int, stored: Sequence[int], where: str) -> list[int]:
    """The rows of each part of a fused weight of `total` rows, in the proportions of the real model's."""
    sizes = [total * rows / sum(stored) for rows in stored]
    if not all(s.is_integer() and s > 0 for s in sizes):
        raise AdapterError(
            f"{where}: its weight has {total} rows, which {len(stored)} parts of {list(stored)} proportions cannot "
            "share"
        )
    return [int(s) for s in sizes]


def split(update: Update, sizes: Sequence[int], where: str) -> list[Update | None]:
    """One update for each block of rows, None for one that block-diagonal factors leave as it is. AdapterError if there
    are no such parts.
    """
    if isinstance(update, Kronecker) and any(s % _block(update) for s in sizes):
        if update.w2a is None or update.w2b is None or update.t2 is not None:
            raise AdapterError(
                f"{where}: a LoKr in blocks of {_block(update)} rows, which the fused weight's parts of {list(sizes)} "
                "rows cut through\n"
                "  no LoKr of the parts is the same; merge it into its base with a program that keeps the fused weights"
            )
        update = _low_rank(update, update.w2a, update.w2b)
    if isinstance(update, Factors) and update.magnitude is not None and update.magnitude.shape[0] == 1:
        raise AdapterError(
            f"{where}: a DoRA with one magnitude for each input of a fused weight; its parts have none of their own"
        )
    if isinstance(update, Factors) and update.magnitude is None and (owners := _owners(update.B, sizes)):
        return _taken_apart(update, sizes, owners)
    blocks = {name: t.split(_counts(update, sizes)) for name, t in _rows(update).items()}
    shared = {name: t for name, t in update.tensors().items() if name not in blocks}
    # Copies: files cannot hold two names for one stretch of memory.
    return [
        _with(update, {n: b[i].clone() for n, b in blocks.items()} | {n: t.clone() for n, t in shared.items()})
        for i in range(len(sizes))
    ]


def fuse(parts: Mapping[str, Update], modules: Sequence[str], stored: Sequence[int]) -> Update | None:
    """The update of the fused weight of `modules` (`stored`: the rows each has in the real model), or None if none is
    the same.
    """
    present = [parts.get(module) for module in modules]
    whole = [p for p in present if p is not None]
    if len(whole) == len(modules) and _alike(whole):
        return _with(whole[0], {name: torch.cat([getattr(p, name) for p in whole]) for name in _rows(whole[0])})
    if all(isinstance(p, Factors) and p.magnitude is None and p.kind == "linear" for p in whole):
        return _blocks([p if isinstance(p, Factors) else None for p in present], stored)
    return None


def swap_halves(update: Update, where: str) -> Update:
    """With the first and second half of the weight's rows exchanged."""
    half = size(update)[0] // 2
    if isinstance(update, Kronecker) and half % _block(update):
        raise AdapterError(
            f"{where}: a LoKr in blocks of {_block(update)} rows, which the middle of the weight's {2 * half} rows cuts"
        )
    if isinstance(update, Factors) and update.magnitude is not None and update.magnitude.shape[0] == 1:
        return replace(update, B=update.B.roll(half, 0))
    return _with(update, {name: t.roll(t.shape[0] // 2, 0) for name, t in _rows(update).items()})


def _low_rank(update: Kronecker, a: Tensor, b: Tensor) -> Factors:
    """W1 ⊗ (W2a W2b) = (W1 ⊗ W2a) (I ⊗ W2b): plain factors of rank i1 · r, whose rows can be cut anywhere."""
    first = wide(update.w1) if update.w1 is not None else wide(update.w1a) @ wide(update.w1b)  # type: ignore[arg-type]
    A = torch.kron(torch.eye(first.shape[1], dtype=first.dtype), wide(b))
    return Factors(A, torch.kron(first, wide(a)), update.scale * A.shape[0])


def _owners(B: Tensor, sizes: Sequence[int]) -> list[int] | None:
    """Which part each column of a block-diagonal B belongs to; None if B is no such matrix."""
    used = torch.stack([block.count_nonzero(0) > 0 for block in B.split(list(sizes))])  # [parts, rank]
    if not used.any() or (used.sum(0) > 1).any():
        return None
    owners = [int(column.int().argmax()) if column.any() else -1 for column in used.T]
    first = next(o for o in owners if o >= 0)
    for i, owner in enumerate(owners):  # a column of zeros is its neighbour's, so that ranks stay
        if owner < 0:
            owners[i] = owners[i - 1] if i else first
    return owners


def _taken_apart(f: Factors, sizes: Sequence[int], owners: Sequence[int]) -> list[Update | None]:
    found: list[Update | None] = []
    for part, block in enumerate(f.B.split(list(sizes))):
        columns = [i for i, owner in enumerate(owners) if owner == part]
        alpha = _rounded(f.alpha * len(columns) / f.A.shape[0])
        found.append(replace(f, A=f.A[columns], B=block[:, columns].contiguous(), alpha=alpha) if columns else None)
    return found


def _rounded(value: float) -> float:
    """Without the last digits, which are the division's: 7.3 / 3 · 3 is not quite 7.3."""
    return float(f"{value:.12g}")


def _blocks(parts: Sequence[Factors | None], stored: Sequence[int]) -> Factors:
    """Block by block. The scales differ: relative to the largest they go into B,
    exactly where that is a power of two.
    """
    whole = [p for p in parts if p is not None]
    unit = whole[0].B.shape[0] / stored[parts.index(whole[0])]
    rank, scale = sum(p.A.shape[0] for p in whole), max(p.scale for p in whole)
    dtype = whole[0].B.dtype
    for p in whole:
        dtype = torch.promote_types(dtype, torch.promote_types(p.A.dtype, p.B.dtype))
    B = torch.zeros(round(unit * sum(stored)), rank, dtype=dtype)
    row = column = 0
    for part, rows in zip(parts, stored):
        if part is not None:
            block = part.B if math.isclose(part.scale, scale, rel_tol=1e-11) else part.B.double() * (part.scale / scale)
            B[row : row + part.B.shape[0], column : column + part.A.shape[0]] = block.to(dtype)
            column += part.A.shape[0]
        row += round(unit * rows)
    return Factors(torch.cat([p.A.to(dtype) for p in whole]), B, _rounded(scale * rank))


def _alike(parts: Sequence[Update]) -> bool:
    """Whether they are of one kind and differ in their rows only."""
    first, names = parts[0], _rows(parts[0])
    if isinstance(first, Factors) and (first.kind != "linear" or first.parts or first.transposed):
        return False
    if isinstance(first, Factors) and first.magnitude is not None and any(_column(p) for p in parts):
        return False
    return all(
        type(p) is type(first)
        and p.scale == first.scale
        and p.tensors().keys() == first.tensors().keys()
        and all(torch.equal(t, p.tensors()[n]) for n, t in first.tensors().items() if n not in names)
        for p in parts
    )


def _column(update: Any) -> bool:
    return update.magnitude is not None and update.magnitude.shape[0] == 1


def _with(update: Any, tensors: Mapping[str, Tensor]) -> Update:
    return replace(update, **tensors)


def _rows(update: Update) -> dict[str, Tensor]:
    return {name: t for name in _ROWS[type(update)] if (t := getattr(update, name)) is not None}


def _block(update: Kronecker) -> int:
    return _sides(update.w2, update.w2a, update.w2b, update.t2)[0]


def _counts(update: Update, sizes: Sequence[int]) -> list[int]:
    return [s // _block(update) for s in sizes] if isinstance(update, Kronecker) else list(sizes)
