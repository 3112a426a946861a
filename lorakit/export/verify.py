"""The written file against the adapter: everything that either does to the base, number by number.

    ΔW           |ΔW in the file − ΔW| over its module's largest |ΔW| (or a thousandth of the adapter's largest, where that is more)
    the others   DoRA's magnitudes, changes of biases, weights saved whole: over the largest of each

`written.py` reads the file on a path of its own, `expected.py` says what it should do, `logits.py` puts both through a base.
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

TOLERANCE = 1e-5  # float32's rounding, of strengths folded into B
# A module whose ΔW is below this part of the adapter's largest is held to that: what cancels to nearly zero is all rounding.
SMALLEST = 1e-3
DELTA, MAGNITUDE, BIAS, SAVED = "ΔW", "DoRA's magnitudes", "changes of biases", "saved weights"


def contents(path: Path, format: str, adapter: Adapter, base: Any = None) -> tuple[Content, Content]:
    """(what the file does, what it should do). `base`: for GGUF, the base's folder or config. AdapterError where it makes no sense."""
    wanted = expected(adapter, format)
    config = base_config(base or adapter.config.base) if format == "gguf" else None
    try:
        return read(path, format, wanted.effects, config), wanted
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, StopIteration, OSError) as error:
        raise AdapterError(f"{path}: read again, it makes no sense: {error}") from error


def differences(found: Content, wanted: Content, where: Path | str) -> dict[str, float]:
    """Of each kind of thing that the adapter has, the largest relative difference. AdapterError where the file holds others, or shapes."""
    theirs, ours = _things(found), _things(wanted)
    for keys, said in ((ours.keys() - theirs.keys(), "lacks"), (theirs.keys() - ours.keys(), "holds what was not written:")):
        if keys:
            raise AdapterError(f"{where}: read again, it {said} {listing([f'{name} ({kind})' for kind, name in sorted(keys)], 3)}")
    apart: dict[str, list[tuple[float, float]]] = {}
    for (kind, name), make in ours.items():
        try:
            off = _off(kind, theirs[kind, name](), make())
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise AdapterError(f"{where}: read again, '{name}' makes no sense: {error}") from error
        apart.setdefault(kind, []).append(off)
    least = SMALLEST * max((size for _, size in apart.get(DELTA, [])), default=0.0)
    return {kind: max(_ratio(off, max(size, least if kind == DELTA else 0.0)) for off, size in offs) for kind, offs in apart.items()}


def _things(content: Content) -> dict[tuple[str, str], Callable[[], np.ndarray]]:
    """All arrays by what they are and whose."""
    made: dict[tuple[str, str], Callable[[], np.ndarray]] = {}
    for name, effect in content.effects.items():
        if effect.delta is not None:
            made[DELTA, name] = effect.delta
        for kind, array in ((MAGNITUDE, effect.magnitude), (BIAS, effect.bias)):
            if array is not None:
                made[kind, name] = partial(np.asarray, array)
    return made | {(SAVED, name): partial(np.asarray, array) for name, array in content.saved.items()}


def _off(kind: str, theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """(the largest difference, the largest number that should be there)."""
    if kind == MAGNITUDE and theirs.ndim == 1:  # MLX's: whether of outputs or of an embedding's tokens is not in the file
        ours = ours.flatten()
    if ours.shape != theirs.shape:
        raise ValueError(f"its {kind} has the shape {list(theirs.shape)} and not {list(ours.shape)}")
    if not ours.size:
        return 0.0, 0.0
    off = np.subtract(theirs, ours, dtype=np.float64)
    largest = _largest(off)
    return largest if math.isfinite(largest) else math.inf, _largest(ours)


def _largest(array: np.ndarray) -> float:
    """The largest |number|; NaN if one is."""
    return float(max(float(array.max()), -float(array.min()), key=abs))


def _ratio(off: float, size: float) -> float:
    return off / size if size else math.inf if off else 0.0
