"""The adapted parts of a packed projection, from lorakit's metadata in a file whose format does not know them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from ..ops.packed import compact_packed


def parts_of(packed: Any, module: str, A: Tensor, B: Tensor, where: Path) -> tuple[bool, ...] | None:
    """The module's entry in `packed`; None if it has none. AdapterError if it does not fit the factors A [n·r, in] and
    B [out, n·r]. `where`: the file, for errors.
    """
    parts = packed.get(module) if isinstance(packed, Mapping) else None
    if parts is None:
        return None
    sound = isinstance(parts, list) and all(isinstance(p, bool) for p in parts) and any(parts)
    if not sound or A.shape[0] % sum(parts) or A.shape[0] != B.shape[1] or compact_packed(B, tuple(parts)) is None:
        raise AdapterError(f"{where}: '{module}' is packed as {parts} according to its metadata, but its B is not")
    return tuple(parts)
