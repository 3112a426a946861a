"""Compare a written file with the adapter: everything that either does to the base, element by element.

    ΔW       |ΔW in the file − ΔW| over the module's largest |ΔW| (or 1/1000 of the adapter's largest, if that is more)
    others   DoRA magnitudes, bias changes, saved weights: difference over the largest element of each

`written.py` reads the file with independent code, `expected.py` computes what it should do, `logits.py` runs both
through a base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter.adapter import Adapter
from ..errors import AdapterError, listing
from ..formats.gguf_names import base_config
from .effect import Content
from .expected import expected
from .written import read

TOLERANCE = 1e-5  # float32 rounding of scales folded into B
# A module's ΔW counts as at least this fraction of the adapter's largest: what cancels to nearly zero is all rounding.
SMALLEST = 1e-3
DELTA, MAGNITUDE, BIAS, SAVED = "ΔW", "DoRA's magnitudes", "changes of biases", "saved weights"


def contents(path: Path, format: str, adapter: Adapter, base: Any = None) -> tuple[Content, Content]:
    """Read (what the file does, what it should do). `base`: for GGUF, the base's folder or config.

    Raises AdapterError if the file is malformed.
    """
    intended = expected(adapter, format)
    config = base_config(base or adapter.config.base) if format == "gguf" else None
    try:
        return read(path, format, intended.effects, config), intended
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, StopIteration, OSError) as error:
        raise AdapterError(f"{path}: read back, the file is malformed: {error}") from error


def differences(stored: Content, intended: Content, where: Path | str) -> dict[str, float]:
    """Measure the largest relative difference of each quantity: ΔW, magnitudes, bias changes, saved weights.

    Raises AdapterError, naming `where`, if the two hold different quantities or shapes.
    """
    theirs, ours = _quantities(stored), _quantities(intended)
    for keys, problem in (
        (ours.keys() - theirs.keys(), "lacks"),
        (theirs.keys() - ours.keys(), "has unexpected content:"),
    ):
        if keys:
            raise AdapterError(
                f"{where}: read back, it {problem} {listing([f'{name} ({kind})' for kind, name in sorted(keys)], 3)}"
            )
    errors: dict[str, list[tuple[float, float]]] = {}
    for (kind, name), array in ours.items():
        try:
            error_and_size = _error(kind, theirs[kind, name](), array())
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise AdapterError(f"{where}: read back, '{name}' is malformed: {error}") from error
        errors.setdefault(kind, []).append(error_and_size)
    floor = SMALLEST * max((size for _, size in errors.get(DELTA, [])), default=0.0)
    return {
        kind: max(_ratio(off, max(size, floor if kind == DELTA else 0.0)) for off, size in pairs)
        for kind, pairs in errors.items()
    }


def _quantities(content: Content) -> dict[tuple[str, str], Callable[[], np.ndarray]]:
    """Return all arrays (lazily), keyed by quantity and module or weight."""
    arrays: dict[tuple[str, str], Callable[[], np.ndarray]] = {}
    for name, effect in content.effects.items():
        if effect.delta is not None:
            arrays[DELTA, name] = effect.delta
        for kind, array in ((MAGNITUDE, effect.magnitude), (BIAS, effect.bias)):
            if array is not None:
                arrays[kind, name] = partial(np.asarray, array)
    return arrays | {(SAVED, name): partial(np.asarray, array) for name, array in content.saved.items()}


def _error(kind: str, theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Return (the largest difference, the largest intended element)."""
    if kind == MAGNITUDE and theirs.ndim == 1:  # MLX's file does not say whether it is per output or per token
        ours = ours.flatten()
    if ours.shape != theirs.shape:
        raise ValueError(f"{kind}: shape {list(theirs.shape)}, expected {list(ours.shape)}")
    if not ours.size:
        return 0.0, 0.0
    largest = _largest(np.subtract(theirs, ours, dtype=np.float64))
    return largest if math.isfinite(largest) else math.inf, _largest(ours)


def _largest(array: np.ndarray) -> float:
    """Return the largest absolute value; NaN if any element is NaN."""
    return float(max(float(array.max()), -float(array.min()), key=abs))


def _ratio(off: float, size: float) -> float:
    return off / size if size else math.inf if off else 0.0
