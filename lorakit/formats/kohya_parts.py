"""An update of a fused weight as updates of its parts, and back: kohya's `attn_qkv` is diffusers' `to_q`, `to_k`,
`to_v`.

    W = [W1; W2; ...]     the parts are blocks of rows        ΔW = B A:  ΔWi = Bi A
                          LoHa: rows of W1a and W2a           LoKr: rows of W1

Splitting is exact and keeps rank and alpha: all parts have the fused A. Fusing parts whose other tensors are equal
gives the fused tensors back, bit for bit. Other low-rank parts, and a subset of the parts, are fused as blocks: A =
[A1; A2; ...] and B block-diagonal, the ranks added. Such a B (sd-scripts' split_qkv trains it too) is recognized, and
split into parts with ranks of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter.dense import with_halves_swapped
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..errors import AdapterError


def part_sizes(total: int, stored: Sequence[int], where: str) -> list[int]:
    """The rows of each part of a fused weight of `total` rows, in the proportions `stored` of the real model.
    AdapterError if they do not divide.
    """
    sizes = [total * rows / sum(stored) for rows in stored]
    if not all(s.is_integer() and s > 0 for s in sizes):
        raise AdapterError(
            f"{where}: its weight has {total} rows, which {len(stored)} parts of {list(stored)} proportions cannot "
            "share"
        )
    return [int(s) for s in sizes]


def split(update: Update, sizes: Sequence[int], where: str) -> list[Update | None]:
    """The updates of blocks of `sizes` rows; None for a block that block-diagonal factors do not change.

    where: the key, for errors. AdapterError if the blocks have no update of their own: a LoKr whose blocks are cut, or
    a DoRA with a magnitude for each input.
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
        return _parts_of_blocks(f, sizes, owners)
    outputs = update.output_tensors()
    if outputs is None:
        raise AdapterError(f"{where}: an update in Tucker form of a fused weight, which is no kernel")
    blocks = {name: t.split([s * t.shape[0] // sum(sizes) for s in sizes]) for name, t in outputs.items()}

    def part(i: int) -> Update:
        # Copies: files cannot hold two names for one stretch of memory.
        return update.map(lambda name, t: (blocks[name][i] if name in blocks else t).clone())

    return [part(i) for i in range(len(sizes))]


def fuse(parts: Mapping[str, Update], modules: Sequence[str], stored: Sequence[int]) -> Update | None:
    """The update of the fused weight of `modules`; None if there is none. `parts`: by module, possibly some of them
    only; `stored`: the rows that each module has in the real model.
    """
    present = [parts.get(module) for module in modules]
    given = [p for p in present if p is not None]
    if len(given) == len(modules) and _alike(given):
        outputs, tensors = given[0].output_tensors() or {}, [p.tensors() for p in given]
        return given[0].map(lambda name, t: torch.cat([own[name] for own in tensors]) if name in outputs else t)
    plain = [p.factors if p is not None and not p.needs_base else None for p in present]
    if all(p is None or (f is not None and f.kind == "linear") for p, f in zip(present, plain, strict=True)):
        return _blocks(plain, stored)
    return None


def swap_halves(update: Update, where: str) -> Update:
    """The update with the halves of the weight's rows swapped. AdapterError for a LoKr whose blocks that would cut."""
    rows, block = update.sizes[0], update.output_block
    if (rows // 2) % block:
        raise AdapterError(
            f"{where}: a LoKr in blocks of {block} rows, which the middle of the weight's {rows} rows cuts"
        )
    return with_halves_swapped(update)


def _owners(B: Tensor, sizes: Sequence[int]) -> list[int] | None:
    """The part that each column of a block-diagonal B [out, r] belongs to; None if B is not block-diagonal."""
    used = torch.stack([block.count_nonzero(0) > 0 for block in B.split(list(sizes))])  # [parts, rank]
    if not used.any() or (used.sum(0) > 1).any():
        return None
    owners = [int(column.int().argmax()) if column.any() else -1 for column in used.T]
    first = next(o for o in owners if o >= 0)
    for i, owner in enumerate(owners):  # a column of zeros goes to its neighbour's part, which keeps the ranks
        if owner < 0:
            owners[i] = owners[i - 1] if i else first
    return owners


def _parts_of_blocks(f: Factors, sizes: Sequence[int], owners: Sequence[int]) -> list[Update | None]:
    parts: list[Update | None] = []
    for part, block in enumerate(f.B.split(list(sizes))):
        columns = [i for i, owner in enumerate(owners) if owner == part]
        alpha = _rounded(f.alpha * len(columns) / f.A.shape[0])
        parts.append(replace(f, A=f.A[columns], B=block[:, columns].contiguous(), alpha=alpha) if columns else None)
    return parts


def _rounded(value: float) -> float:
    """`value` without the rounding of a division: 7.3 / 3 · 3 is not quite 7.3."""
    return float(f"{value:.12g}")


def _blocks(parts: Sequence[Factors | None], stored: Sequence[int]) -> Factors:
    """Block-diagonal factors. Scales that differ go into B relative to the largest, exactly if by a power of two."""
    given = [p for p in parts if p is not None]
    unit = given[0].B.shape[0] / stored[parts.index(given[0])]
    rank, scale = sum(p.A.shape[0] for p in given), max(p.scale for p in given)
    dtype = given[0].B.dtype
    for p in given:
        dtype = torch.promote_types(dtype, torch.promote_types(p.A.dtype, p.B.dtype))
    B = torch.zeros(round(unit * sum(stored)), rank, dtype=dtype)
    row = column = 0
    for part, rows in zip(parts, stored):
        if part is not None:
            block = part.B if math.isclose(part.scale, scale, rel_tol=1e-11) else part.B.double() * (part.scale / scale)
            B[row : row + part.B.shape[0], column : column + part.A.shape[0]] = block.to(dtype)
            column += part.A.shape[0]
        row += round(unit * rows)
    return Factors(torch.cat([p.A.to(dtype) for p in given]), B, _rounded(scale * rank))


def _alike(parts: Sequence[Update]) -> bool:
    """Whether the updates are of one kind and differ only in the tensors that run over the outputs."""
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
