"""What a written file should do to the base, computed from the adapter's own factors, under the format's names.

Names and row order are the receiver's: a kohya key may cover several modules, whose rows are concatenated, and for some
the two halves are swapped. GGUF's names and row order are undone when the file is read (`written.gguf`), so
transformers' are used here too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..formats import comfyui, names
from ..formats.bundled import bundled
from ..formats.kohya import written_for
from .effect import Content, Effect, low_rank


def expected(adapter: Adapter, format: str) -> Content:
    """Compute what the adapter does to the base, under the names of `format`."""
    if format in ("kohya", "comfyui"):
        return Content(_by_keys(adapter, format), {key: _array(t) for key, t in bundled(adapter.embeddings).items()})
    return Content(
        {m: effect_of(u) for m, u in adapter.updates.items()}, {name: _array(t) for name, t in adapter.saved.items()}
    )


def effect_of(update: Update) -> Effect:
    """Compute the effect of one update.

    For LoHa, LoKr and dense updates ΔW is lorakit's own, in float64; `effect` has the equations to check it.
    """
    change, factors, tensors = update.without_base(), update.factors, update.tensors()
    delta = (lambda: _matrix(change)) if factors is None else (lambda: _low_rank(factors))
    magnitude, bias = (_array(tensors[name]) if name in tensors else None for name in ("magnitude", "bias"))
    return Effect(delta if update.changes_weight else None, magnitude, bias)


def _matrix(update: Update) -> np.ndarray:
    matrices = update.matrices()
    if matrices is not None:  # of experts, below each other
        return np.concatenate([_matrix(u) if u.factors is None else _low_rank(u.factors) for u in matrices])
    delta = update.map(lambda _, t: t.detach().cpu().double()).delta().numpy()
    return delta.reshape(delta.shape[0], -1)


def _low_rank(f: Factors) -> np.ndarray:
    A, B = _array(f.A), _array(f.B)
    if f.groups == 1 or A.shape[0] != B.shape[1]:
        return low_rank(B, A, f.scale)
    # All groups share A, but each sees only its own inputs: [out, in, *k], block-diagonal.
    out, size_in, kernel = B.shape[0], A.shape[1], math.prod(A.shape[2:])
    delta = np.zeros((f.groups, out // f.groups, f.groups, size_in * kernel))
    for g, rows in enumerate(np.split(low_rank(B, A, f.scale), f.groups)):
        delta[g, :, g] = rows
    return delta.reshape(out, -1)


def _by_keys(adapter: Adapter, format: str) -> dict[str, Effect]:
    model = written_for(adapter)
    if model is None:  # a model that lorakit does not know: the adapter has the file's own names
        return {key: effect_of(update) for key, update in adapter.updates.items()}
    updates, sizes = adapter.updates, names.shapes(model)
    places = names.places(model) if format == "kohya" else comfyui.places(model)
    effects: dict[str, Effect] = {}
    for place in {places[m] for m in updates}:
        parts = [(m, effect_of(updates[m]) if m in updates else None) for m in place.modules]
        if len(parts) > 1:
            effects[place.key] = _concatenated([e for _, e in parts], [sizes[m] for m, _ in parts])
            continue
        module, effect = parts[0]
        assert effect is not None
        swapped = names.swaps_halves(model, place.key, module, (2, 1))  # decided by name; the shape is checked below
        swapped = swapped and (model not in names.MODELS or _shift_and_scale(updates[module]))
        effects[place.key] = _swapped(effect) if swapped else effect
    return effects


def _concatenated(parts: list[Effect | None], sizes: list[tuple[int, ...]]) -> Effect:
    """Return the effect of the modules of one key, rows concatenated; zeros for modules that the adapter does not
    change.
    """

    def delta() -> np.ndarray:
        rows = [e.delta() if e is not None and e.delta is not None else None for e in parts]
        # Scale the real model's row counts to the adapter's, which may be of a tiny model with the same names.
        width, unit = next((r.shape[1], r.shape[0] / s[0]) for r, s in zip(rows, sizes) if r is not None)
        return np.concatenate([np.zeros((round(s[0] * unit), width)) if r is None else r for r, s in zip(rows, sizes)])

    def joined(name: str) -> np.ndarray | None:
        arrays = [getattr(e, name) for e in parts if e is not None and getattr(e, name) is not None]
        return np.concatenate(arrays) if arrays else None

    changes = any(e is not None and e.delta is not None for e in parts)
    return Effect(delta if changes else None, joined("magnitude"), joined("bias"))


def _swapped(e: Effect) -> Effect:
    """Return the effect with the two halves of the rows swapped."""

    def swap(rows: np.ndarray) -> np.ndarray:
        return np.concatenate(np.split(rows, 2)[::-1])

    magnitude = e.magnitude if e.magnitude is None or e.magnitude.shape[0] == 1 else swap(e.magnitude)
    bias, delta = e.bias, e.delta
    return Effect(None if delta is None else lambda: swap(delta()), magnitude, None if bias is None else swap(bias))


def _shift_and_scale(update: Update) -> bool:
    """Whether the weight has two rows per input: the shift and scale of an adaptive norm."""
    out, inputs = update.sizes
    return not update.changes_weight or out == 2 * inputs  # for a lone bias, rely on the name


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().double().numpy() if tensor.is_floating_point() else tensor.detach().cpu().numpy()
