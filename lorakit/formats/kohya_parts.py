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

import torch
from torch import Tensor

from ..adapter.lora import Factors
from ..adapter.update import Update
from ..errors import AdapterError


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
    if not update.outputs_independent:
        raise AdapterError(
            f"{where}: a DoRA with one magnitude for each input of a fused weight; its parts have none of their own"
        )
    if any(s % update.output_block for s in sizes):
        factors = update.as_factors()
        if factors is None:
            raise AdapterError(
                f"{where}: a LoKr in blocks of {update.output_block} rows, which the fused weight's parts of "
                f"{list(sizes)} rows cut through\n"
                "  no LoKr of the parts is the same; merge it into its base with a program that keeps the fused weights"
            )
        update = factors
    f = update.factors
    if f is not None and not update.needs_base and (owners := _owners(f.B, sizes)):
        return _taken_apart(f, sizes, owners)
    outputs = update.output_tensors()
    if outputs is None:
        raise AdapterError(f"{where}: an update in Tucker form of a fused weight, which is no kernel")
    blocks = {name: t.split([s * t.shape[0] // sum(sizes) for s in sizes]) for name, t in outputs.items()}

    def part(i: int) -> Update:
        # Copies: files cannot hold two names for one stretch of memory.
        return update.map(lambda name, t: (blocks[name][i] if name in blocks else t).clone())

    return [part(i) for i in range(len(sizes))]


def fuse(parts: Mapping[str, Update], modules: Sequence[str], stored: Sequence[int]) -> Update | None:
    """The update of the fused weight of `modules` (`stored`: the rows each has in the real model), or None if none is
    the same.
    """
    present = [parts.get(module) for module in modules]
    whole = [p for p in present if p is not None]
    if len(whole) == len(modules) and _alike(whole):
        outputs, tensors = whole[0].output_tensors() or {}, [p.tensors() for p in whole]
        return whole[0].map(lambda name, t: torch.cat([own[name] for own in tensors]) if name in outputs else t)
    plain = [p.factors if p is not None and not p.needs_base else None for p in present]
    if all(p is None or (f is not None and f.kind == "linear") for p, f in zip(present, plain, strict=True)):
        return _blocks(plain, stored)
    return None


def swap_halves(update: Update, where: str) -> Update:
    """With the first and second half of the weight's rows exchanged. AdapterError if no update of the kind is that."""
    rows, block = update.sizes[0], update.output_block
    if (rows // 2) % block:
        raise AdapterError(
            f"{where}: a LoKr in blocks of {block} rows, which the middle of the weight's {rows} rows cuts"
        )
    return update.halves_swapped()


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
    first, outputs = parts[0], parts[0].output_tensors()
    f = first.factors
    if outputs is None or not all(p.outputs_independent for p in parts):
        return False
    if f is not None and (f.kind != "linear" or f.parts or f.transposed):
        return False
    return all(
        type(p) is type(first)
        and p.scale == first.scale
        and p.tensors().keys() == first.tensors().keys()
        and all(torch.equal(t, p.tensors()[n]) for n, t in first.tensors().items() if n not in outputs)
        for p in parts
    )
