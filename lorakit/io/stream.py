"""Stream safetensors files tensor by tensor and block by block: files of any size in a few megabytes of memory.

    8 bytes   n, the header's length, little-endian
    n bytes   JSON: {name: {"dtype", "shape", "data_offsets": [from, to]}}
    the rest  data; offsets are relative to its start and leave no gaps

All names, dtypes and shapes are known before the first element is written, so the header is written first and the data
follows in its order. Plain reads rather than memory mapping: mapped pages (`safe_open`) count as resident memory once
touched, whereas a block read here is freed after use.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import LorakitError, not_the_file
from ..ops.delta import row_blocks

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MERGEABLE = {"F64", "F32", "F16", "BF16"}  # dtypes that can take a low-rank update

MAX_HEADER = 100_000_000  # what the safetensors library itself accepts
# Elements per block. Adding ΔW to a bf16 matrix takes as long with 2^16 as with 2^22, so memory decides: 4 MB in fp32.
BLOCK = 1 << 20
COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Slot:
    """A tensor's location: `nbytes` bytes from byte `start` of a file."""

    path: Path
    dtype: str  # the file's name for it; tensors of a dtype that torch lacks can still be copied
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """torch's dtype, None if torch lacks it."""
        return DTYPES.get(self.dtype)

    def part(self, start: int, stop: int) -> Slot:
        """Return rows `start` to `stop` as a tensor of their own."""
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return Slot(self.path, self.dtype, shape, self.start + start * row, (stop - start) * row)

    def copied(self) -> Iterator[Tensor]:
        """Yield the tensor's bytes as uint8 vectors of at most COPY_BYTES."""
        with open(self.path, "rb", buffering=0) as file:
            for offset in range(0, self.nbytes, COPY_BYTES):
                yield _read(file, self.path, self.start + offset, min(COPY_BYTES, self.nbytes - offset))

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which rows, the block [rows, -1]). A scalar is one row. torch must have the dtype."""
        dtype, shape = DTYPES[self.dtype], self.shape or (1,)
        with open(self.path, "rb", buffering=0) as file:
            for rows in row_blocks(shape, BLOCK):
                size = self.nbytes // shape[0]
                block = _read(file, self.path, self.start + rows.start * size, (rows.stop - rows.start) * size)
                yield rows, block.view(dtype).view(rows.stop - rows.start, -1)

    def elements(self, at: Sequence[int]) -> Tensor:
        """Return the elements at the given indices of the flattened tensor, [len(at)]."""
        dtype = DTYPES[self.dtype]
        with open(self.path, "rb", buffering=0) as file:
            read = [_read(file, self.path, self.start + i * dtype.itemsize, dtype.itemsize).view(dtype) for i in at]
        return torch.cat(read) if read else torch.empty(0, dtype=dtype)


def read_header(path: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    """Return (tensors by name, metadata). Raises LorakitError if the file is truncated or its header malformed."""

    def broken(what: str) -> LorakitError:
        return LorakitError(
            f"{path} is not a sound safetensors file: {what}\n  was the download or copy interrupted? fetch it again"
        )

    problem = not_the_file(path)
    if problem is not None:
        raise LorakitError(problem)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise broken(f"it has {size} bytes")
        length = struct.unpack("<Q", start)[0]
        if length > min(MAX_HEADER, size - 8):
            raise broken(f"its header would have {length:,} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise broken(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    slots = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            dtype, shape = str(entry["dtype"]), tuple(int(s) for s in entry["shape"])
            valid = 0 <= begin <= end and all(s >= 0 for s in shape)
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"the entry of '{name}' is malformed") from error
        if not valid or 8 + length + end > size:
            raise broken(f"'{name}' would end at byte {8 + length + end:,} of {size:,}")
        if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise broken(f"'{name}' has {end - begin:,} bytes, which is not {list(shape)} of {dtype}")
        slots[name] = Slot(path, dtype, shape, 8 + length + begin, end - begin)
    return slots, metadata


class StreamWriter:
    """Write a safetensors file: the layout first, then each tensor's blocks, in the layout's order or after `at`.

    with StreamWriter(path, {"weight": ("BF16", (4, 3), 24)}) as out:
        out.write(block)
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[str, tuple[int, ...], int]],
        metadata: Mapping[str, str] | None = None,
    ):
        """layout: name -> (dtype as in the file, shape, bytes)."""
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        self._starts: dict[str, int] = {}
        for name, (dtype, shape, nbytes) in layout.items():
            self._starts[name] = offset
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf8")
        text += b" " * (-len(text) % 8)
        self.path, self._left = path, offset
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._data = 8 + len(text)
        self._put(memoryview(struct.pack("<Q", len(text)) + text))

    def at(self, name: str) -> None:
        """Continue with this tensor."""
        self._file.seek(self._data + self._starts[name])

    def write(self, block: Tensor, crc: int = 0) -> int:
        """Write the current tensor's next elements, in its dtype (or as bytes). Returns `crc` updated over them."""
        self._left -= block.nbytes
        assert self._left >= 0, f"{self.path}: more was written than its layout says"
        view = bytes_of(block)
        self._put(view)
        return zlib.crc32(view, crc)

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                assert self._left == 0, f"{self.path}: {self._left} bytes of its layout were not written"
                os.fsync(self._file.fileno())

    def _put(self, view: memoryview) -> None:
        while len(view):
            view = view[self._file.write(view) :]


def _read(file: FileIO, path: Path, start: int, count: int) -> Tensor:
    buffer = torch.empty(count, dtype=torch.uint8)
    view = bytes_of(buffer)
    file.seek(start)
    while len(view):
        count_read = file.readinto(view)
        if not count_read:
            raise LorakitError(f"{path} ended {len(view):,} bytes early: it changed while being read\n  try again")
        view = view[count_read:]
    return buffer


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's memory, without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal size are bitwise equal. As int64: comparing bytes takes torch six times as long."""
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    n = first.numel() // 8 * 8
    same_words = torch.equal(first[:n].view(torch.int64), second[:n].view(torch.int64))
    return same_words and torch.equal(first[n:], second[n:])
