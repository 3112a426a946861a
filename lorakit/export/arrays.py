"""Read a safetensors file as numpy arrays, directly from its specification and without the safetensors library.

8 bytes   n, the header's length, little-endian
n bytes   JSON: {"<name>": {"dtype": "F32", "shape": [...], "data_offsets": [from, to]}, ...,
                 "__metadata__": {"<key>": "<text>"}}
the rest  the elements, little-endian, row-major
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E5M2": "u1",
    "F8_E4M3": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def _e4m3() -> np.ndarray:
    """Return the 256 values of float8 E4M3 (4 exponent bits, 3 mantissa bits; Micikevicius et al.

    2022), which has no infinity. [256]
    """
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7) / 8
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where(bits & 127 == 127, np.nan, np.where(bits & 128, -magnitude, magnitude))


# Decoders from bits, for the types that numpy lacks.
_DECODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "BF16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),  # the upper half of a float32
    "F8_E5M2": lambda bits: (bits.astype(np.uint16) << 8).view(np.float16),  # the upper half of a float16
    "F8_E4M3": lambda bits: _e4m3()[bits],
}


def header(path: Path) -> dict[str, Any]:
    """Parse the JSON header. Raises ValueError if it claims to be longer than the file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(
                f"{path.name} claims a header of {length:,} bytes, but the file has only {path.stat().st_size:,}"
            )
        return json.loads(file.read(length))


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors by name. Raises ValueError for an unknown dtype."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, slot in header(path).items():
        if name == "__metadata__":
            continue
        if slot["dtype"] not in _TYPES:
            raise ValueError(f"'{name}' has the unknown dtype {slot['dtype']}")
        first, last = slot["data_offsets"]
        raw = content[start + first : start + last].view(_TYPES[slot["dtype"]])
        tensors[name] = _DECODE.get(slot["dtype"], np.asarray)(raw).reshape(slot["shape"])
    return tensors
