"""A GGUF file's pairs and tensors, read without trusting it (the format: llama.cpp's ggml/docs/gguf.md, versions 2 and 3).

    "GGUF"  version: u32  tensors: u64  pairs: u64
    pair    key: str, type: u32, value            str: length u64 and UTF-8; array: type u32, count u64, values
    tensor  name: str, axes: u32, sizes: u64 each (the fastest first), type: u32, offset: u64
    padding to general.alignment (32), then the data, from where the offsets count

Every claim is held against the file's size before memory is taken; the `gguf` package's reader believes them.
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
# type -> (numbers in a block, its bytes, torch's dtype): what llama.cpp's converter writes adapters in
TYPES = {0: (1, 4, torch.float32), 1: (1, 2, torch.float16), 30: (1, 2, torch.bfloat16), Q8_0: (32, 34, torch.uint8)}
MAX_AXES, MAX_NAME = 4, 1 << 16

Value = str | int | float | bool | None


@dataclass
class _Cursor:
    path: Path
    data: mmap.mmap
    at: int = 0

    def wrong(self, what: str) -> AdapterError:
        return AdapterError(f"{self.path} is not a readable GGUF file: {what} (byte {self.at:,} of {len(self.data):,})")

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise self.wrong(f"{what} would take {count:,} bytes, more than are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Value:
        """A pair's value; of an array, which no adapter needs, nothing."""
        what = f"the value of '{key}'"
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise self.wrong(f"{what} has the unknown type {kind}")
        inner, count = self.number("I", what), self.number("Q", what)
        if inner in SCALARS:
            self.take(count * struct.calcsize("<" + SCALARS[inner]), what)
        elif inner == STRING and count <= (len(self.data) - self.at) // 8:  # each has at least its length
            for _ in range(count):
                self.take(self.number("Q", what), what)
        else:
            raise self.wrong(f"{what} is an array of {count:,} values of type {inner}")
        return None


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """(pairs, tensors in numpy's order of axes). AdapterError, naming key or tensor, for anything that does not fit the file."""
    if path.stat().st_size < 24:
        raise AdapterError(f"{path} is not a readable GGUF file: it has {path.stat().st_size} bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        pairs, count = _pairs(cursor)
        slots = _slots(cursor, count)
        alignment = pairs.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise cursor.wrong(f"general.alignment is {alignment!r}; expected a power of two")
        begin = -(-cursor.at // alignment) * alignment
        left = len(data) - begin
        for name, (shape, _, offset, size) in slots.items():
            if offset % alignment or offset + size > left:
                raise cursor.wrong(f"tensor '{name}' {list(shape)} would end at byte {begin + offset + size:,}")
        if sum(size for *_, size in slots.values()) > left:  # else tensors that share bytes would fill the memory
            raise cursor.wrong("its tensors claim more bytes together than the file has")
        return pairs, {
            name: _tensor(bytearray(data[begin + offset : begin + offset + size]), shape, kind)
            for name, (shape, kind, offset, size) in slots.items()
        }


def _pairs(cursor: _Cursor) -> tuple[dict[str, Value], int]:
    """(the pairs, how many tensors follow)."""
    if cursor.take(4, "the magic") != MAGIC:
        raise cursor.wrong("it does not begin with 'GGUF'")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        hint = ": it was written for a big-endian machine" if version & 0xFFFF == 0 else ""
        raise cursor.wrong(f"version {version}{hint}; expected 2 or 3")
    tensors, count = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of pairs")
    left = len(cursor.data) - cursor.at
    if tensors > left // 24 or count > left // 13:  # the least that each takes
        raise cursor.wrong(f"it claims {tensors:,} tensors and {count:,} pairs")
    pairs: dict[str, Value] = {}
    for number in range(count):
        key = cursor.text(f"the key of pair {number}")
        if key in pairs or len(key) > MAX_NAME:
            raise cursor.wrong(
                f"key '{key[:80]}' stands there twice" if key in pairs else f"pair {number} has a key of {len(key):,} letters"
            )
        pairs[key] = cursor.value(cursor.number("I", f"the type of '{key}'"), key)
    return pairs, tensors


def _slots(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int, int]]:
    """name -> (shape, type, offset, bytes)."""
    slots: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
    for number in range(count):
        name = cursor.text(f"the name of tensor {number}")
        what = f"tensor '{name[:80]}'"
        if name in slots:
            raise cursor.wrong(f"{what} stands there twice")
        axes = cursor.number("I", what)
        if not 1 <= axes <= MAX_AXES:
            raise cursor.wrong(f"{what} has {axes} axes; expected 1 to {MAX_AXES}")
        shape = tuple(cursor.number("Q", what) for _ in range(axes))[::-1]
        kind, offset = cursor.number("I", what), cursor.number("Q", what)
        if kind not in TYPES:
            raise cursor.wrong(f"{what} has GGML type {kind}; adapters are read in F32, F16, BF16 and Q8_0")
        block, size, _ = TYPES[kind]
        if shape[-1] % block or 0 in shape:
            raise cursor.wrong(f"{what} has shape {list(shape)}, which is no whole number of its blocks of {block}")
        slots[name] = (shape, kind, offset, math.prod(shape) // block * size)
    return slots


def _tensor(raw: bytearray, shape: tuple[int, ...], kind: int) -> Tensor:
    flat = torch.frombuffer(raw, dtype=TYPES[kind][2])
    if kind == Q8_0:  # blocks of one fp16 scale and 32 int8
        blocks = flat.reshape(-1, 34)
        flat = blocks[:, :2].contiguous().view(torch.float16).float() * blocks[:, 2:].contiguous().view(torch.int8).float()
    return flat.reshape(shape)
