"""What a file should do to the base: from the adapter's own factors, under the format's names.

The names and the order of rows are the receiver's: a key of kohya may stand for several modules, whose rows then follow each other, and of
some the two halves are swapped. GGUF's are undone where it is read (`written.gguf`), so that here, too, stand transformers' names.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapter.adapter import Adapter
from ..adapter.dense import Dense
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..formats import names
from .effect import Content, Effect, low_rank


def expected(adapter: Adapter, format: str) -> Content:
    """What the adapter does, under the format's names."""
    if format == "kohya":
        return Content(_by_kohyas_keys(adapter))
    return Content({m: effect_of(u) for m, u in adapter.updates.items()}, {name: _array(t) for name, t in adapter.saved.items()})


def effect_of(update: Update) -> Effect:
    """One update's effect. Of the other kinds ΔW is lorakit's own, in double precision: the equations that it is held against are in `effect`."""
    if isinstance(update, Factors):
        return Effect(lambda: _low_rank(update), None if update.magnitude is None else _array(update.magnitude))
    bias = update.bias if isinstance(update, Dense) else None
    delta = None if isinstance(update, Dense) and update.weight is None else lambda: _matrix(update)
    return Effect(delta, bias=None if bias is None else _array(bias))


def _matrix(update: Any) -> np.ndarray:
    exact = replace(update, **{name: tensor.detach().cpu().double() for name, tensor in update.tensors().items()})
    whole = exact.delta().numpy()
    return whole.reshape(whole.shape[0], -1)


def _low_rank(f: Factors) -> np.ndarray:
    A, B = _array(f.A), _array(f.B)
    if f.groups == 1 or A.shape[0] != B.shape[1]:
        return low_rank(B, A, f.scale)
    # One A for all groups, each of which sees its own inputs alone: [out, in, *k] with zeros outside the blocks.
    out, size_in, kernel = B.shape[0], A.shape[1], math.prod(A.shape[2:])
    whole = np.zeros((f.groups, out // f.groups, f.groups, size_in * kernel))
    for g, rows in enumerate(np.split(low_rank(B, A, f.scale), f.groups)):
        whole[g, :, g] = rows
    return whole.reshape(out, -1)


def _by_kohyas_keys(adapter: Adapter) -> dict[str, Effect]:
    said = adapter.metadata.get("model")
    model = said if said in names.MODELS else names.model_of(adapter.updates)
    assert model is not None, "it has been written"
    updates, sizes = adapter.updates, names.shapes(model)
    made: dict[str, Effect] = {}
    for place in {names.places(model)[m] for m in updates}:
        parts = [(m, effect_of(updates[m]) if m in updates else None) for m in place.modules]
        if len(parts) > 1:
            made[place.key] = _one_below_the_other([e for _, e in parts], [sizes[m] for m, _ in parts])
            continue
        module, effect = parts[0]
        assert effect is not None
        named_so = names.swaps_halves(model, place.key, module, (2, 1))  # asked of the name; the shape is looked at after it
        made[place.key] = _swapped(effect) if named_so and _shift_and_scale(updates[module]) else effect
    return made


def _one_below_the_other(parts: list[Effect | None], sizes: list[tuple[int, ...]]) -> Effect:
    """Modules that one key stands for; those that the adapter leaves as they are have zeros."""

    def delta() -> np.ndarray:
        rows = [e.delta() if e is not None and e.delta is not None else None for e in parts]
        # The real model's heights, in the proportion that the adapter's widths have to its own (tiny models of the same names).
        width, unit = next((r.shape[1], r.shape[0] / s[0]) for r, s in zip(rows, sizes) if r is not None)
        return np.concatenate([np.zeros((round(s[0] * unit), width)) if r is None else r for r, s in zip(rows, sizes)])

    def joined(name: str) -> np.ndarray | None:
        found = [getattr(e, name) for e in parts if e is not None and getattr(e, name) is not None]
        return np.concatenate(found) if found else None

    changes = any(e is not None and e.delta is not None for e in parts)
    return Effect(delta if changes else None, joined("magnitude"), joined("bias"))


def _swapped(e: Effect) -> Effect:
    """The second half of the rows before the first."""

    def swap(rows: np.ndarray) -> np.ndarray:
        return np.concatenate(np.split(rows, 2)[::-1])

    magnitude = e.magnitude if e.magnitude is None or e.magnitude.shape[0] == 1 else swap(e.magnitude)
    bias, delta = e.bias, e.delta
    return Effect(None if delta is None else lambda: swap(delta()), magnitude, None if bias is None else swap(bias))


def _shift_and_scale(update: Update) -> bool:
    """Whether the weight has two rows for each input: a norm's shift and scale."""
    if isinstance(update, Factors):
        return update.B.shape[0] == 2 * update.A.shape[1]
    delta = effect_of(update).delta
    return delta is None or delta().shape[0] == 2 * delta().shape[1]  # of a bias alone the name must do


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().double().numpy() if tensor.is_floating_point() else tensor.detach().cpu().numpy()
