"""Merge an adapter of a quantized base into the base that was quantized: what differs between the two.

    Q - W       what quantization changed, of each quantized weight
    ΔW          what the adapter adds

The adapter was trained on Q, and meets W: it is as good there as ‖Q - W‖ is small. The two must be the same base, which
shows in weights that were not quantized, equal within the rounding of 16 bits, and in ‖Q - W‖ / ‖W‖, which for another
base is near 1.4. (AWQ moves scales between a norm and the linears after it, so that its weights are not rounded ones of
the original, and its adapters do not fit there.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.fingerprint import alike, sample_positions
from ..errors import LorakitError, did_you_mean, listing
from ..io.stream import MERGEABLE, Slot
from .base import Base
from .merge_plan import Entry
from .merge_report import Difference
from .parts import Part, open_parts
from .quantized.weight import PackedSlot
from .write import all_changes

# Rounding to nearest changes weights by 0.004 (int8), 0.1 (4 bits), 0.25 (3 bits), 0.55 (2 bits) of their norm.
LARGEST_DIFFERENCE = 0.8


Pair = tuple[Part, Part | None]  # a part of BASE, and the same part before it was quantized


def open_pairs(base: Path, onto: Path | None, names: Collection[str], everything: bool) -> list[Pair]:
    """Open the parts of a base that have these modules or weights, and those of the unquantized base.

    Raises LorakitError if there is no such folder, or the two have other parts.
    """
    parts = open_parts(base, names, everything, quantized=True)
    if onto is None:
        return [(part, None) for part in parts]
    if not onto.exists():
        here = [p.name for p in onto.parent.iterdir()] if onto.parent.is_dir() else []
        raise LorakitError(
            f"there is no base '{onto}'{did_you_mean(onto.name, here)}\n"
            "  give the folder of the unquantized base as onto (--onto)"
        )
    if base.is_dir() != onto.is_dir():
        raise LorakitError(f"{onto} and {base} are not a base before and after quantization: one is a single file")
    originals = {part.name: part for part in open_parts(onto, names, everything, quantized=True)}
    missing = [part.name or "a language model" for part in parts if part.name not in originals]
    if missing:
        raise LorakitError(f"{onto} lacks {missing[0]}, which {base} has\n  give the base that it was quantized from")
    return [(part, originals[part.name]) for part in parts]


def check_pairs(pairs: Iterable[Pair]) -> None:
    """Raise LorakitError if a part's unquantized base is not the same base; see `check_same`."""
    pairs = list(pairs)
    if any(original is not None for _, original in pairs) and not any(part.base.quantization for part, _ in pairs):
        raise LorakitError(
            f"{pairs[0][0].base.folder} is not quantized: its adapter merges into it directly\n"
            "  leave out onto (--onto)"
        )
    for part, original in pairs:
        if original is not None:
            check_same(part.base, original.base)


def check_same(base: Base, original: Base) -> None:
    """Raise LorakitError unless a quantized base has the original's weights where they are not quantized, and weights
    of the same shapes where they are.
    """
    if original.quantization is not None:
        raise LorakitError(
            f"{original.folder} is quantized too ({original.quantization.kind})\n"
            "  give the base before quantization as onto (--onto)"
        )
    for name, slot in base.tensors.items():
        other = original.tensors.get(name)
        shape = None if other is None else other.shape
        if isinstance(slot, PackedSlot) and shape != slot.shape:
            has = "it lacks that" if shape is None else f"there it is {list(shape)}"
            raise _other(base, original, f"'{name}' is {list(slot.shape)} in the quantized base, and {has}")
    apart = [
        n for n, slot in base.tensors.items() if n in original.tensors and not _close(n, slot, original.tensors[n])
    ]
    if apart:
        is_awq = base.quantization is not None and base.quantization.kind == "awq"
        hint = "; AWQ moves scales into the norms, and then its adapters fit the AWQ base only" if is_awq else ""
        raise _other(base, original, f"{listing(apart, 3)} {'hold' if len(apart) > 1 else 'holds'} other values{hint}")


def differences(part: Part, original: Base, entries: Sequence[Entry], force_base: bool = False) -> list[Difference]:
    """Measure what differs between a quantized part and the original, weight by weight. `entries`: the merge's plan.

    Raises LorakitError for weights that are not rounded ones of the original, unless `force_base`.
    """
    base = part.base
    updates = {entry.name: entry for entry in entries if entry.updates}
    found = []
    for name, slot in base.tensors.items():
        other = original.tensors.get(name)
        if not isinstance(slot, PackedSlot) or other is None or other.shape != slot.shape:
            continue
        apart = total = change = 0.0
        blocks = zip(slot.rows(), other.rows(), _changes(updates.get(name), slot), strict=True)
        for (_, Q), (_, W), dW in blocks:
            apart += _squares(Q - W.float())
            total += _squares(W.float())
            change += _squares(dW) if dW is not None else 0.0
        module = name.removesuffix(".weight")
        relative = math.sqrt(apart / total) if total else 0.0
        found.append(Difference(module, relative, math.sqrt(apart / change) if change else None).within(part.name))
    worst = max(found, key=lambda d: d.relative, default=None)
    if worst is not None and worst.relative > LARGEST_DIFFERENCE and not force_base:
        raise _other(
            base, original, f"'{worst.module}' differs by {worst.relative:.2f} of its norm, which is more than rounding"
        )
    return found


def _changes(entry: Entry | None, slot: Slot) -> Iterator[Tensor | None]:
    """Yield ΔW by the blocks that `slot` has."""
    if entry is None:
        yield from (None for _ in slot.rows())
        return
    yield from (change for _, _, change in all_changes(entry))


def _close(name: str, slot: Slot, other: Slot) -> bool:
    """Whether a weight that is not quantized has the same sampled elements in both, or cannot be compared."""
    if isinstance(slot, PackedSlot) or not {slot.dtype, other.dtype} <= MERGEABLE or not math.prod(slot.shape):
        return True
    if slot.shape != other.shape:
        return False
    at = sample_positions(math.prod(slot.shape))
    first, second = ({"samples": {name: each.elements(at).float().tolist()}} for each in (slot, other))
    return alike(first, second, name)


def _squares(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _other(base: Base, original: Base, why: str) -> LorakitError:
    return LorakitError(
        f"{original.folder} is not the base that {base.folder} was quantized from: {why}\n"
        "  give that base as onto (--onto), or force_base=True (--force-base) if you know better"
    )
