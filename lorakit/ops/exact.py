"""Change a weight, W' = factor ∘ W + ΔW, so that every bit can be restored.

Most updates have no factor. Rounding makes (W + ΔW) − ΔW, or (W' − ΔW) / factor, differ from W by a few units in the
last place. `add_` stores only that difference: per block of rows, with two, four or eight bits per weight (whichever is
smallest). Code 0 marks the rare weight whose difference does not fit; its value is stored in full. With |ΔW| below |W|
this takes a quarter to half a byte per weight. It can exceed one byte only if ΔW is much larger than W, so that the sum
no longer contains W.

Differences are taken between the floats' bit patterns, as integers: flipping the low bits of negative values makes the
patterns of adjacent floats adjacent integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import StateError
from .delta import row_blocks

_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Scaled(NamedTuple):
    """W' = factor ∘ W + added, of some rows, both in float64 or float32. `factor`: broadcasts to [rows, -1]."""

    factor: Tensor
    added: Tensor

    def apply(self, W: Tensor) -> Tensor:
        """Return W' in W's precision, rounded once. W: [rows, -1]."""
        return torch.addcmul(self.added, W.to(self.added.dtype), self.factor).to(W.dtype)

    def invert(self, changed: Tensor) -> Tensor:
        """Return W, but for rounding, from W' [rows, -1]. Where the factor is zero, nothing of W is left: zero."""
        W = (changed.to(self.added.dtype) - self.added) / self.factor
        return torch.where(self.factor == 0, 0, W).to(changed.dtype)

    def size(self) -> str:
        """Say how much it changes, for an error."""
        factor = f"its factors reach {float(self.factor.abs().max()):.3g}"
        return f"{factor} and ΔW {float(self.added.abs().max()):.3g}" if self.added.any() else factor


class Added(NamedTuple):
    """W' = W + added, of some rows [rows, -1]."""

    added: Tensor

    def apply(self, W: Tensor) -> Tensor:
        return (W.to(self.added.dtype) + self.added).to(W.dtype)

    def invert(self, changed: Tensor) -> Tensor:
        return (changed.to(self.added.dtype) - self.added).to(changed.dtype)

    def size(self) -> str:
        """Say how much it changes, for an error."""
        return f"ΔW reaches {float(self.added.abs().max()):.3g}"


Change = Callable[[slice], Added | Scaled]  # of these rows of the weight


def adding(delta_rows: Callable[[slice], Tensor]) -> Change:
    """Return the change that adds ΔW. `delta_rows`: some rows of it, [rows, -1]."""
    return lambda rows: Added(delta_rows(rows))


@dataclass
class Block:
    """One block's differences: `codes` of `width` bits, packed into bytes; `patterns`: the bit patterns of the weights
    with code 0, in order.
    """

    rows: slice
    width: int
    codes: Tensor
    patterns: Tensor


@dataclass
class Undo:
    """What `subtract_` needs to restore the weight. `blocks`: the changed ones; `checksum`: of their original bits."""

    checksum: int
    blocks: list[Block] = field(default_factory=list)

    def nbytes(self) -> int:
        return sum(b.codes.nbytes + b.patterns.nbytes for b in self.blocks)


def add_(weight: Tensor, change: Change, where: str | None = None) -> Undo:
    """Change the weight in place, rounded once. Returns what undoes it.

    `where`, the weight's name: raise StateError, with the weight as it was, where a finite one would become infinite or
    NaN.
    """
    weight = weight.detach()
    undo = Undo(0)
    for rows in row_blocks(weight.shape):
        own = change(rows)
        if isinstance(own, Added) and not own.added.any():
            continue  # most of an embedding, of which some rows are trained
        original = weight[rows].reshape(own.added.shape)
        undo.checksum += _checksum(original)
        merged = own.apply(original)
        if where is not None and not torch.isfinite(merged).all() and torch.isfinite(original).all():
            undo.checksum -= _checksum(original)
            subtract_(weight, change, undo, where)  # the blocks before
            raise StateError(
                f"merging would make {where} infinite or NaN: {own.size()}, and "
                f"{str(weight.dtype).removeprefix('torch.')} ends at {torch.finfo(weight.dtype).max:.3g}\n"
                "  look at the adapter's norms (lorakit inspect), or merge into a base of another precision"
            )
        undo.blocks.append(_encode(rows, original, own.invert(merged)))
        weight[rows] = merged.view(weight[rows].shape)
    return undo


def subtract_(weight: Tensor, change: Change, undo: Undo, where: str) -> None:
    """Undo `add_`: restore the weight's original bits. `where`: the module, for the error.

    Raises StateError, and leaves the weight unchanged, if the bits would differ.
    """
    weight = weight.detach()
    restored = []
    for block in undo.blocks:
        own = change(block.rows)
        restored.append(_decode(block, own.invert(weight[block.rows].reshape(own.added.shape))))
    if sum(_checksum(values) for values in restored) != undo.checksum:
        raise StateError(
            f"unmerge of {where} would not restore the base's bits: the weight or the adapter's factors have changed "
            "since the merge, or the merge ran on another device or with another thread count\n"
            "  move the model back to where it was merged, or load the base again"
        )
    for block, values in zip(undo.blocks, restored, strict=True):
        weight[block.rows] = values.view(weight[block.rows].shape)


def _ordered(values: Tensor) -> Tensor:
    """Bit patterns as int64 in the order of the values; its own inverse on patterns."""
    kind = _BITS[values.dtype]
    bits = values.contiguous().view(kind)
    return _flip(bits).to(torch.int64)


def _flip(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> (torch.iinfo(bits.dtype).bits - 1)) & torch.iinfo(bits.dtype).max)


def _checksum(flat: Tensor) -> int:
    return int(flat.contiguous().view(_BITS[flat.dtype]).sum(dtype=torch.int64))


def _encode(rows: slice, original: Tensor, back: Tensor) -> Block:
    apart = (_ordered(original) - _ordered(back)).flatten()
    size = original.element_size()
    best = None
    for width in (2, 4, 8):
        most = (1 << (width - 1)) - 1
        misfits = apart.abs() > most
        cost = apart.numel() * width / 8 + int(misfits.sum()) * size
        if best is None or cost < best[0]:
            best = cost, width, most, misfits
    assert best is not None
    _, width, most, misfits = best
    codes = torch.where(misfits, 0, apart + most + 1).to(torch.uint8)  # 1 ... 2^width - 1
    # As integers: torch's float kernels may turn a NaN's payload into another.
    return Block(rows, width, _pack(codes, width), original.contiguous().view(_BITS[original.dtype]).flatten()[misfits])


def _decode(block: Block, back: Tensor) -> Tensor:
    codes = _unpack(block.codes, block.width, back.numel())
    apart = codes.to(torch.int64) - (1 << (block.width - 1))
    kind = _BITS[back.dtype]
    patterns = _flip((_ordered(back).flatten() + apart).to(kind))
    patterns[codes == 0] = block.patterns
    return patterns.view(back.dtype).view_as(back)


def _pack(codes: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for i in range(1, per_byte):
        packed |= padded[:, i] << (i * width)
    return packed


def _unpack(packed: Tensor, width: int, count: int) -> Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & ((1 << width) - 1)).flatten()[:count]
