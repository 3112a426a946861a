"""What adapters must agree on before they can be added: their base, and all that is a value rather than a change of one.

A weight saved whole (a new head, a trained bias) and the vector of a learned token replace what was there. Two of them have no
sum: they are taken over where all adapters that have one have the same, or as their weighted mean where that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import AdapterError, listing
from .adapter import Adapter
from .parts import wide

Saved = Literal["equal", "mean"]


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """AdapterError if the fingerprints of two adapters speak of different bases. One without a fingerprint says nothing."""
    known = [(number, a.metadata["fingerprint"]) for number, a in enumerate(adapters, start=1) if a.metadata.get("fingerprint")]
    for (i, first), (j, second) in combinations(known, 2):
        lines = _unlike(first, second)
        if lines:
            raise AdapterError(
                f"adapters {i} and {j} were trained on different bases:\n  "
                + "\n  ".join(lines)
                + "\n  force=True (--force) if you know better"
            )


def _unlike(first: Any, second: Any) -> list[str]:
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return ["a fingerprint is damaged"]
    lines = [
        f"{what}: {first.get(what)} and {second.get(what)}" for what in ("architecture", "shapes") if first.get(what) != second.get(what)
    ]
    ours, theirs = first.get("samples"), second.get("samples")
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return [*lines, "a fingerprint is damaged"]
    for name in ours.keys() & theirs.keys():
        try:
            a, b = (torch.tensor(numbers[name], dtype=torch.float64).flatten() for numbers in (ours, theirs))
        except (TypeError, ValueError):
            return [*lines, "a fingerprint is damaged"]
        # As loose as the fingerprint's own comparison with a model: the same base in another precision is the same base.
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0.02, atol=1e-4 + 0.01 * float(a.abs().max()) if a.numel() else 0):
            lines.append(f"weights: {name} holds other values")
    return lines


def whole_values(what: str, held: Sequence[Mapping[str, Tensor]], weights: Sequence[float], how: Saved) -> dict[str, Tensor]:
    """One value of each name. AdapterError naming those that differ, unless `how` is "mean"."""
    names = dict.fromkeys(name for values in held for name in values)
    result, differing = {}, []
    for name in names:
        versions = [(w, values[name]) for w, values in zip(weights, held, strict=True) if name in values]
        first = versions[0][1]
        if all(v.shape == first.shape and torch.equal(v, first) for _, v in versions):
            result[name] = first
        elif how == "mean":
            result[name] = _mean(what, name, versions)
        else:
            differing.append(name)
    if differing:
        raise AdapterError(
            f"the adapters hold different values of {len(differing)} {what}s: {listing(differing)}\n"
            "  such a value replaces the base's, so two of them have no sum; saved='mean' (--saved mean) takes their weighted mean"
        )
    return result


def _mean(what: str, name: str, versions: Sequence[tuple[float, Tensor]]) -> Tensor:
    total = sum(w for w, _ in versions)
    shapes = [list(v.shape) for _, v in versions]
    if any(shape != shapes[0] for shape in shapes):
        raise AdapterError(f"{what} '{name}' has the shapes {listing(map(str, shapes))}: no mean of them")
    if total <= 0:
        raise AdapterError(
            f"{what} '{name}': the weights add up to {total:g}, so it has no weighted mean\n  give weights whose sum is positive"
        )
    return sum((w / total) * wide(v) for w, v in versions).to(versions[0][1].dtype)  # type: ignore[union-attr]
