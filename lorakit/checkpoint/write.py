"""Write the planned tensors block by block, then read them back and compare with the base.

    W' = round(W + Σ ΔW)        added in float32 (float64 stays), rounded once

Memory: a few blocks, independent of the tensors' size, and the adapter's factors.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LorakitError
from ..io.stream import DTYPES, MERGEABLE, Slot, StreamWriter, bytes_of, read_header, same_bytes
from .merge_plan import Entry, RowUpdates
from .merge_report import Requantized, TargetReport
from .requantize import Measure, WeightCodec


@dataclass(frozen=True)
class WrittenTensor:
    """An updated tensor as written. `largest`: the largest |ΔW| of each of its updates; `crc`: CRC-32 of its bytes, or
    of those of all its tensors, one after the other.
    """

    largest: list[float]
    crc: int


@dataclass(frozen=True)
class Reports:
    """What each update of a file changed, and what quantizing did to each weight that was quantized again."""

    targets: list[TargetReport]
    requantized: list[Requantized]


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Sort tensors as a file holds them: wide dtypes first, so that each starts at a multiple of its element size."""
    return sorted(entries, key=lambda e: (-_width(e.dtype), e.source.start if e.source else math.inf))


def _layout(entries: Sequence[Entry]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return the file's tensors in its order: name -> (dtype, shape, bytes)."""
    tensors = [(n, dtype, shape, e.bytes_of(n)) for e in entries for n, (dtype, shape) in e.layout.items()]
    return {n: (dtype, shape, nbytes) for n, dtype, shape, nbytes in sorted(tensors, key=lambda t: -_width(t[1]))}


def _width(dtype: str) -> int:
    found = DTYPES.get(dtype)
    return found.itemsize if found is not None else 1


def write_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], done: Callable[[str], None]
) -> dict[str, WrittenTensor]:
    """Write one safetensors file; `done(name)` is called after each tensor. Returns the updated tensors.

    Raises LorakitError if a value is too large for the dtype.
    """
    written: dict[str, WrittenTensor] = {}
    with StreamWriter(path, _layout(entries), metadata) as out:
        for entry in entries:
            out.at(next(iter(entry.layout)))
            if entry.packing is not None:
                written[entry.name] = _write_quantized(out, entry, entry.packing)
            elif entry.value is not None:
                value = entry.value.to(DTYPES[entry.dtype])
                _check_finite(entry, value, entry.value)
                out.write(value)
            elif _as_is(entry):
                for block in entry.slot.copied():
                    out.write(block)
            elif not entry.updates:
                for _, block in entry.slot.rows():
                    out.write(_rounded(entry, block, block))
            else:
                largest, crc = [], 0
                for slot, row_updates in entry.pieces():
                    most = 0.0
                    for _, block, change in _changes(slot, row_updates):
                        most = max(most, _largest(change)) if change is not None else most
                        crc = out.write(_rounded(entry, _sum(block, change), block), crc)
                    if row_updates is not None:
                        largest.append(most)
                written[entry.name] = WrittenTensor(largest, crc)
            done(entry.name)
    return written


def _write_quantized(out: StreamWriter, entry: Entry, packing: WeightCodec) -> WrittenTensor:
    largest, crc = [0.0] * bool(entry.updates), 0

    def blocks() -> Iterator[Tensor]:
        for _, block, change in all_changes(entry):
            if change is not None:
                largest[0] = max(largest[0], _largest(change))
            yield _sum(block.float(), change)

    made = packing.quantized(blocks())
    for name in packing.layout:
        out.at(name)
        crc = out.write(made[name], crc)
    return WrittenTensor(largest, crc)


def merged_rows(entry: Entry) -> Iterator[tuple[slice, Tensor]]:
    """Yield the merged tensor in blocks of rows [n, -1], not rounded: W + ΔW in float32 (float64 stays); unchanged
    tensors and replaced ones in their own dtype.
    """
    if entry.value is not None:
        value = entry.value.reshape((*entry.shape[:1], -1) if entry.shape else (1, 1))
        yield slice(0, value.shape[0]), value
        return
    for rows, block, change in all_changes(entry):
        yield rows, _sum(block, change)


def all_changes(entry: Entry) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield blocks of rows of all pieces: (rows of the entry, W[rows], ΔW[rows] or None)."""
    start = 0
    for slot, row_updates in entry.pieces() if entry.updates else iter([(entry.slot, None)]):
        for rows, block, change in _changes(slot, row_updates):
            yield slice(start + rows.start, start + rows.stop), block, change
        start += slot.shape[0] if slot.shape else 1


def _changes(slot: Slot, row_updates: RowUpdates | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield blocks of rows: (rows, W[rows], ΔW[rows] or None)."""
    made = [update.on(slot) for update in row_updates.updates] if row_updates is not None else []
    for rows, block in slot.rows():
        changes = [change(rows, block) for change in made]
        yield rows, block, reduce(torch.add, changes) if changes else None


def _sum(block: Tensor, change: Tensor | None) -> Tensor:
    if change is None:
        return block
    return change.add_(block) if change.dtype == torch.promote_types(change.dtype, block.dtype) else change + block


def _rounded(entry: Entry, new: Tensor, old: Tensor) -> Tensor:
    new = new.to(DTYPES[entry.dtype])
    _check_finite(entry, new, old)
    return new


def read_back(
    path: Path, entries: Sequence[Entry], written: Mapping[str, WrittenTensor], done: Callable[[str], None]
) -> Reports:
    """Compare a written file with the base. Returns what each update changed.

    Raises LorakitError if anything else differs, or an updated tensor's checksum does.
    """
    slots, _ = read_header(path)
    if list(slots) != list(_layout(entries)):
        raise _unlike(path, "its list of tensors")
    reports: list[TargetReport] = []
    requantized: list[Requantized] = []
    for entry in entries:
        if any((slots[n].dtype, slots[n].shape) != each for n, each in entry.layout.items()):
            raise _unlike(path, f"'{entry.name}'")
        if entry.packing is not None:
            target, measured = _measure_quantized(path, entry, entry.packing, slots, written[entry.name])
            reports += target
            requantized.append(measured)
            done(entry.name)
            continue
        slot = slots[entry.name]
        if entry.updates:
            reports += _measure(path, entry, slot, written[entry.name])
        elif entry.value is not None:
            value = entry.value.to(DTYPES[entry.dtype]).reshape((*slot.shape[:1], -1) if slot.shape else (1, 1))
            if not all(same_bytes(block, value[rows]) for rows, block in slot.rows()):
                raise _unlike(path, f"'{entry.name}'")
        elif _as_is(entry):
            if not all(same_bytes(a, b) for a, b in zip(slot.copied(), entry.slot.copied(), strict=True)):
                raise _unlike(path, f"'{entry.name}'")
        else:
            pairs = zip(slot.rows(), entry.slot.rows(), strict=True)
            if not all(same_bytes(a, b.to(a.dtype)) for (_, a), (_, b) in pairs):
                raise _unlike(path, f"'{entry.name}'")
        done(entry.name)
    return Reports(reports, requantized)


def _measure_quantized(
    path: Path, entry: Entry, packing: WeightCodec, slots: Mapping[str, Slot], updated: WrittenTensor
) -> tuple[list[TargetReport], Requantized]:
    """Measure a weight that was quantized again: what quantizing did, and what its update changed of Q(W)."""
    crc = 0
    for name in packing.layout:
        for block in slots[name].copied():
            crc = zlib.crc32(bytes_of(block), crc)
    if crc != updated.crc:
        raise _unlike(path, f"'{entry.name}'")
    base_is_quantized = packing.like is not None and entry.slot is packing.base
    before = entry.slot if base_is_quantized else packing.slot(packing.quantized(b for _, b in entry.slot.rows()))
    measure, applied, changed = Measure(packing.module), 0.0, 0
    blocks = zip(all_changes(entry), packing.slot(slots).rows(), before.rows(), strict=True)
    for (_, block, change), (_, new), (_, old) in blocks:
        measure.add(block if change is None else block + change, new, old, change)
        applied = max(applied, _largest(new - old))
        changed += int((new != old).sum())
    share = changed / math.prod(entry.shape)
    targets = [
        TargetReport(u.module, entry.name, entry.shape, u.rank, largest, applied, share)
        for u, largest in zip(entry.updates, updated.largest, strict=True)
    ]
    return targets, measure.result()


def _measure(path: Path, entry: Entry, slot: Slot, updated: WrittenTensor) -> list[TargetReport]:
    """Measure |written - base| for each update of a tensor, with the base rounded to the written dtype."""
    reports, crc, start = [], 0, 0
    largest = iter(updated.largest)
    for source, row_updates in entry.pieces():
        applied, changed = 0.0, 0
        written = slot.part(start, start + source.shape[0])
        for (_, new), (_, old) in zip(written.rows(), source.rows(), strict=True):
            crc = zlib.crc32(bytes_of(new), crc)
            before = old.to(new.dtype)
            changed += int((new != before).sum())
            wide = torch.promote_types(new.dtype, torch.float32)
            applied = max(applied, _largest(new.to(wide) - before.to(wide)))
        start += source.shape[0]
        if row_updates is None and changed:
            raise _unlike(path, f"'{entry.name}'")
        if row_updates is not None:
            share = changed / math.prod(source.shape)
            reports.append(
                TargetReport(
                    row_updates.module, entry.name, source.shape, row_updates.rank, next(largest), applied, share
                )
            )
    if crc != updated.crc:
        raise _unlike(path, f"'{entry.name}'")
    return reports


def _as_is(entry: Entry) -> bool:
    return entry.copied and entry.packing is None and entry.source is not None and entry.source.dtype == entry.dtype


def _largest(block: Tensor) -> float:
    """Return max |x| in one pass without a copy; not finite if any element is not."""
    if not block.numel():
        return 0.0
    low, high = torch.aminmax(block)
    return max(-float(low), float(high))


def _check_finite(entry: Entry, new: Tensor, old: Tensor) -> None:
    if entry.dtype in MERGEABLE and not math.isfinite(_largest(new)) and math.isfinite(_largest(old)):
        raise LorakitError(
            f"'{entry.name}' has values too large for {DTYPES[entry.dtype]}\n"
            "  write the result in another precision: dtype=torch.bfloat16 or torch.float32"
        )


def _unlike(path: Path, what: str) -> LorakitError:
    return LorakitError(
        f"{path.name}: {what} does not read back as it was written\n"
        "  the disk or memory is faulty, or the base changed meanwhile; nothing was kept"
    )
