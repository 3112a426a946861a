"""Which parts of a packed projection are adapted, as our own metadata says: plain files hold the update without its
zeros' meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from ..ops.packed import compact_packed


def parts_of(packed: Any, module: str, A: Tensor, B: Tensor, where: Path) -> tuple[bool, ...] | None:
    """The module's entry in `packed`, checked against its factors A [n·r, in] and B [out, n·r]; None if it has none."""
    parts = packed.get(module) if isinstance(packed, Mapping) else None
    if parts is None:
        return None
    sound = isinstance(parts, list) and all(isinstance(p, bool) for p in parts) and any(parts)
    if not sound or A.shape[0] % sum(parts) or A.shape[0] != B.shape[1] or compact_packed(B, tuple(parts)) is None:
        raise AdapterError(f"{where}: '{module}' is said to be packed as {parts}, and its B does not have that form")
    return tuple(parts)
