"""Read the key-value pairs and tensors of an untrusted GGUF file (versions 2 and 3; llama.cpp's ggml/docs/gguf.md).

    "GGUF"  version: u32  tensors: u64  pairs: u64
    pair    key: str, type: u32, value            str: length u64 and UTF-8; array: type u32, count u64, values
    tensor  name: str, axes: u32, sizes: u64 each (fastest-varying first), type: u32, offset: u64
    padding to general.alignment (32), then the data, which offsets are relative to

Every size is checked against the file's before memory is allocated; the `gguf` package's reader does not check.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
Q8_0 = 8
# GGML type -> (elements per block, bytes per block, torch dtype), of the types llama.cpp's converter writes adapters in
TYPES = {0: (1, 4, torch.float32), 1: (1, 2, torch.float16), 30: (1, 2, torch.bfloat16), Q8_0: (32, 34, torch.uint8)}
MAX_AXES, MAX_NAME = 4, 1 << 16

Value = str | int | float | bool | None


@dataclass
class _Cursor:
    """A read position in a mapped file. Its methods raise AdapterError, with `what` was being read and the position."""

    path: Path
    data: mmap.mmap
    position: int = 0

    def error(self, what: str) -> AdapterError:
        return AdapterError(
            f"{self.path} is not a readable GGUF file: {what} (byte {self.position:,} of {len(self.data):,})"
        )

    def take(self, count: int, what: str) -> bytes:
        """Read `count` bytes."""
        if count > len(self.data) - self.position:
            raise self.error(f"{what} would take {count:,} bytes, more than are left")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, code: str, what: str):
        """Read one little-endian value. code: its `struct` format character."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str) -> str:
        """Read a string: its length and UTF-8."""
        raw = self.take(self.scalar("Q", what), what)
        try:
            return raw.decode("utf8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Value:
        """Read the value of a key. Arrays, which no adapter needs, are skipped and give None."""
        what = f"the value of '{key}'"
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise self.error(f"{what} has the unknown type {kind}")
        inner, count = self.scalar("I", what), self.scalar("Q", what)
        if inner in SCALARS:
            self.take(count * struct.calcsize("<" + SCALARS[inner]), what)
        elif inner == STRING and count <= (len(self.data) - self.position) // 8:  # a length each
            for _ in range(count):
                self.take(self.scalar("Q", what), what)
        else:
            raise self.error(f"{what} is an array of {count:,} values of type {inner}")
        return None


def is_gguf(path: Path) -> bool:
    """Whether a file starts with GGUF's magic bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Return (key-value pairs, tensors with axes in numpy's order).

    Raises AdapterError, naming the key or tensor, for anything malformed or larger than the file.
    """
    if path.stat().st_size < 24:
        raise AdapterError(f"{path} is not a readable GGUF file: it has {path.stat().st_size} bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        pairs, count = _pairs(cursor)
        entries = _tensor_entries(cursor, count)
        alignment = pairs.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise cursor.error(f"general.alignment is {alignment!r}; expected a power of two")
        begin = -(-cursor.position // alignment) * alignment
        left = len(data) - begin
        for name, (shape, _, offset, size) in entries.items():
            if offset % alignment or offset + size > left:
                raise cursor.error(f"tensor '{name}' {list(shape)} would end at byte {begin + offset + size:,}")
        if sum(size for *_, size in entries.values()) > left:  # overlapping tensors could otherwise fill the memory
            raise cursor.error("its tensors claim more bytes together than the file has")
        return pairs, {
            name: _tensor(bytearray(data[begin + offset : begin + offset + size]), shape, kind)
            for name, (shape, kind, offset, size) in entries.items()
        }


def _pairs(cursor: _Cursor) -> tuple[dict[str, Value], int]:
    """Return the key-value pairs and the number of tensors that follow."""
    if cursor.take(4, "the magic") != MAGIC:
        raise cursor.error("it does not start with 'GGUF'")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        hint = ": it was written for a big-endian machine" if version & 0xFFFF == 0 else ""
        raise cursor.error(f"version {version}{hint}; expected 2 or 3")
    tensors, count = cursor.scalar("Q", "the number of tensors"), cursor.scalar("Q", "the number of pairs")
    left = len(cursor.data) - cursor.position
    if tensors > left // 24 or count > left // 13:  # 24 and 13 bytes are the smallest possible
        raise cursor.error(f"it claims {tensors:,} tensors and {count:,} pairs")
    pairs: dict[str, Value] = {}
    for i in range(count):
        key = cursor.text(f"the key of pair {i}")
        if key in pairs:
            raise cursor.error(f"key '{key[:80]}' occurs twice")
        if len(key) > MAX_NAME:
            raise cursor.error(f"pair {i} has a key of {len(key):,} characters; expected at most {MAX_NAME:,}")
        pairs[key] = cursor.value(cursor.scalar("I", f"the type of '{key}'"), key)
    return pairs, tensors


def _tensor_entries(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int, int]]:
    """Read the tensors' entries: name -> (shape, GGML type, offset, bytes)."""
    entries: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
    for i in range(count):
        name = cursor.text(f"the name of tensor {i}")
        what = f"tensor '{name[:80]}'"
        if name in entries:
            raise cursor.error(f"{what} occurs twice")
        axes = cursor.scalar("I", what)
        if not 1 <= axes <= MAX_AXES:
            raise cursor.error(f"{what} has {axes} axes; expected 1 to {MAX_AXES}")
        shape = tuple(cursor.scalar("Q", what) for _ in range(axes))[::-1]
        kind, offset = cursor.scalar("I", what), cursor.scalar("Q", what)
        if kind not in TYPES:
            raise cursor.error(f"{what} has GGML type {kind}; adapters are read in F32, F16, BF16 and Q8_0")
        block, size, _ = TYPES[kind]
        if shape[-1] % block or 0 in shape:
            raise cursor.error(
                f"{what} has shape {list(shape)}, whose last axis is not a multiple of the block size {block}"
            )
        entries[name] = (shape, kind, offset, math.prod(shape) // block * size)
    return entries


def _tensor(raw: bytearray, shape: tuple[int, ...], kind: int) -> Tensor:
    flat = torch.frombuffer(raw, dtype=TYPES[kind][2])
    if kind == Q8_0:  # blocks of one fp16 scale and 32 int8
        blocks = flat.reshape(-1, 34)
        flat = (
            blocks[:, :2].contiguous().view(torch.float16).float() * blocks[:, 2:].contiguous().view(torch.int8).float()
        )
    return flat.reshape(shape)
