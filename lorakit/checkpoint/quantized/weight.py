"""A module's quantized weight in the files, read as the weight that it stands for.

QuantizedTensors    its tensors, their format, and W's shape
PackedSlot          W itself, float32, for everything that reads a checkpoint's weights (`io.stream.Slot`): rows are
                    dequantized block by block; only the packed tensors of one module are in memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...io.stream import BLOCK, COPY_BYTES, DTYPES, Slot
from ...ops.delta import row_blocks
from .format import Format, Shapes


@dataclass(frozen=True)
class QuantizedTensors:
    """`read`: returns the module's tensors by their own names; `shape`: (out, in); `slots`: where the tensors are, if
    they are in files.
    """

    format: Format
    settings: Any
    shape: tuple[int, int]
    read: Callable[[], Mapping[str, Tensor]]
    slots: Mapping[str, Slot]

    @property
    def shapes(self) -> Shapes:
        """Its tensors' dtypes and shapes, as in the file's header."""
        return {name: (slot.dtype, slot.shape) for name, slot in self.slots.items()}

    def rows(self, start: int = 0, stop: int | None = None, most: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """Yield outputs `start` to `stop` in the blocks of `row_blocks`: (rows after `start`, W's in float32)."""
        opened = self.format.opened(self.read())
        stop = self.shape[0] if stop is None else stop
        for rows in row_blocks((stop - start, self.shape[1]), most):
            yield rows, self._some(opened, start + rows.start, start + rows.stop)[0]

    def elements(self, at: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """Return the elements at flat positions [n] of W, or of its transpose, and how far each of them may be from the
        weight before it was quantized: both [n].
        """
        opened, (out, inner) = self.format.opened(self.read()), self.shape
        row, column = (at % out, at // out) if transposed else (at // inner, at % inner)
        found = []
        for r, c in zip(row.tolist(), column.tolist(), strict=True):
            W, errors = self._some(opened, r, r + 1)
            found.append((W[0, c], errors()[0, c]))
        values, errors_at = zip(*found, strict=True)
        return torch.stack(values), torch.stack(errors_at)

    def _some(self, opened: Mapping[str, Tensor], start: int, stop: int) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return outputs `start` to `stop` of W, and a function for their errors: both [stop - start, in]."""
        step = self.format.step(self.shape, self.settings)
        first, last = start // step * step, min(-(-stop // step) * step, self.shape[0])
        cut = self.format.cut(opened, self.shape, first, last, self.settings)
        W, kept = self.format.dequantized(cut, self.settings), slice(start - first, stop - first)
        return W[kept].contiguous(), lambda: self.format.errors(cut, W, self.settings)[kept]


@dataclass(frozen=True)
class PackedSlot(Slot):
    """A quantized weight in the place of an ordinary one. `transposed`: of a Conv1D, whose weight is [in, out]; it is
    dequantized at once. `offset`: the row of W that its first one is.

    `dtype` is F32, and `nbytes` what W has in it; `start` is where the packed elements are.
    """

    packed: QuantizedTensors
    transposed: bool = False
    offset: int = 0

    def part(self, start: int, stop: int) -> Slot:
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, nbytes=4 * shape[0] * shape[1], offset=self.offset + start)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        first, last = self.offset, self.offset + self.shape[0]
        if not self.transposed:
            yield from self.packed.rows(first, last)
            return
        W = torch.cat([block for _, block in self.packed.rows()]).T[first:last].contiguous()
        yield from ((rows, W[rows]) for rows in row_blocks(self.shape, BLOCK))

    def copied(self) -> Iterator[Tensor]:
        for _, block in self.rows():
            yield from block.reshape(-1).view(torch.uint8).split(COPY_BYTES)

    def elements(self, at: Sequence[int]) -> Tensor:
        return self.sampled(torch.tensor(at))[0]

    def with_tensors(self, format: Format, settings: Any, own: Mapping[str, Tensor | Slot]) -> PackedSlot:
        """Return the same weight as other tensors hold it, in memory or in files, by their own names."""
        slots = {name: t for name, t in own.items() if isinstance(t, Slot)}
        read = partial(read_all, slots) if slots else lambda: {n: t for n, t in own.items() if isinstance(t, Tensor)}
        return replace(self, packed=QuantizedTensors(format, settings, self.packed.shape, read, slots))

    def sampled(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elements at these flat positions of W, and the largest rounding error of each: both [n]."""
        return self.packed.elements(at, self.transposed)


def packed_slot(packed: QuantizedTensors, main: Slot, transposed: bool) -> PackedSlot:
    """Return W of a module in the files. `main`: the tensor that holds the elements."""
    out, inner = packed.shape
    shape = (inner, out) if transposed else (out, inner)
    return PackedSlot(main.path, "F32", shape, main.start, 4 * out * inner, packed, transposed)


def read_all(slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """Read tensors into memory."""
    return {name: _read(slot) for name, slot in slots.items()}


def _read(slot: Slot) -> Tensor:
    blocks = list(slot.copied())
    data = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.uint8)
    return data.view(DTYPES[slot.dtype]).view(slot.shape)
