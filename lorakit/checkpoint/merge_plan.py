"""Plan OUT before a byte is written: each tensor, where it comes from and how it is made.

copied      the base's bytes; a quantized weight that stays so, all its tensors
updated     W + Σ wᵢ ΔWᵢ; only some rows of a tensor that several modules share
replaced    an adapter's saved weight instead of the base's; added, if the base has none
untied      a separate tensor for a weight that was stored once and used twice
requantized a weight quantized again, into several tensors (`requantize.WeightCodec`)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.tokens import Tokens
from ..errors import AdapterError, TargetError, listing
from ..io.stream import DTYPES, NAMES, Slot
from ..ops.delta import as_matrices
from .base import Base
from .change import Change
from .changes import Changes
from .experts import as_stored
from .locate import locate
from .quantized.weight import PackedSlot
from .renaming import Renaming
from .requantize import Requantize, WeightCodec


@dataclass(frozen=True)
class RowUpdates:
    """The updates of rows [start, stop) of a tensor: one module's, by one or more adapters."""

    start: int
    stop: int
    updates: tuple[Change, ...]

    @property
    def module(self) -> str:
        """The module that all of them change."""
        return self.updates[0].module

    @property
    def rank(self) -> int:
        """The sum of their ranks."""
        return sum(u.rank for u in self.updates)


@dataclass(frozen=True)
class Entry:
    """One tensor of OUT. `source`: the base's tensor that it starts from. `updates`: by rows, in order. `value`: what
    replaces it instead. `packing`: how it is quantized again, into the tensors of `layout`; `dtype` is F32 then.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    source: Slot | None = None
    updates: tuple[RowUpdates, ...] = ()
    value: Tensor | None = None
    packing: WeightCodec | None = None

    @property
    def slot(self) -> Slot:
        """`source`, which every entry without a `value` has."""
        assert self.source is not None
        return self.source

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Its tensors in OUT: name -> (dtype, shape)."""
        return self.packing.layout if self.packing is not None else {self.name: (self.dtype, self.shape)}

    @property
    def nbytes(self) -> int:
        """Its size in OUT, in bytes."""
        return sum(self.bytes_of(name) for name in self.layout)

    def bytes_of(self, name: str) -> int:
        """Return the size of one of its tensors in OUT, in bytes."""
        dtype, shape = self.layout[name]
        return math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else self.slot.nbytes

    @property
    def copied(self) -> bool:
        """Whether the base's values stay (possibly in another dtype)."""
        return not self.updates and self.value is None

    @property
    def untouched(self) -> bool:
        """Whether it holds the base's tensor, perhaps in another dtype; not one that was or becomes quantized."""
        return self.copied and self.packing is None and not isinstance(self.source, PackedSlot)

    def pieces(self) -> Iterator[tuple[Slot, RowUpdates | None]]:
        """Yield the source in blocks of rows, each with its updates or None."""
        at, slot = 0, self.slot
        for row_updates in self.updates:
            if row_updates.start > at:
                yield slot.part(at, row_updates.start), None
            yield slot.part(row_updates.start, row_updates.stop), row_updates
            at = row_updates.stop
        if at < slot.shape[0]:
            yield slot.part(at, slot.shape[0]), None


@dataclass(frozen=True)
class Plan:
    """All of OUT. `renames`: one for each adapter, from its names to the files'; `requantize`: how the base's quantized
    weights are quantized again, None if it has none or they become ordinary ones.
    """

    base: Base
    files: Mapping[str, list[Entry]]
    renames: list[Renaming]
    replaced: list[str]
    added: list[str]
    untied: list[str]
    requantize: Requantize | None = None

    @property
    def split(self) -> set[str]:
        """The tied weights that get a tensor of their own."""
        return {name for name in self.untied if name not in self.base.tensors}

    @property
    def dequantized(self) -> list[str]:
        """The base's quantized weights that are ordinary ones in OUT."""
        return [e.name for e in self.entries if isinstance(e.source, PackedSlot) and e.packing is None]

    @property
    def grown(self) -> tuple[int, int] | None:
        """The rows of the embedding before and after, if it gets rows for tokens."""
        sizes = [
            (e.slot.shape[0], e.shape[0]) for e in self.entries if e.source is not None and e.shape != e.slot.shape
        ]
        return sizes[0] if sizes else None

    @property
    def entries(self) -> list[Entry]:
        """The tensors of all files."""
        return [entry for entries in self.files.values() for entry in entries]


def make_plan(
    base: Base,
    adapters: Sequence[tuple[float, Adapter]],
    dtype: torch.dtype | None,
    untie: bool,
    requantize: Requantize | None = None,
) -> Plan:
    """Plan the merge of adapters with their weights. `untie`: separate tied weights that change; `requantize`: how the
    base's quantized weights are quantized again; without it they become ordinary weights.

    Raises TargetError or AdapterError for every part of an adapter that does not fit the base.
    """
    changes, renames = Changes(base), []
    ties: dict[str, str] = {}
    for weight, given in adapters:
        by_module = as_stored(base, given.updates)
        adapter = replace(given, updates={m: u for own in by_module.values() for m, u in own.items()})
        locations = locate(base, adapter.updates, adapter.saved)
        changes.add(weight, adapter, locations)
        renames.append(locations.rename)
        ties |= locations.ties
    changes.check()
    tied = {*ties, *ties.values()}
    untying = untie and any(n in tied for n in changes.touched)
    if not untying:
        _keep_tied(changes, ties)
    own = [user for user in ties if user not in base.tensors] if untying else []
    sources = {**base.tensors, **{user: base.tensors[ties[user]] for user in own}}
    files: dict[str, list[Entry]] = {file: [] for file in base.shards}
    for name, slot in sources.items():
        row_updates = tuple(
            RowUpdates(start, stop, tuple(us)) for (start, stop), us in sorted(changes.updates.get(name, {}).items())
        )
        value = changes.values.get(name)
        shape = slot.shape if value is None else tuple(value.shape)  # more rows, where tokens were added
        if requantize is not None and isinstance(slot, PackedSlot):
            for entry in _requantized(base, name, slot, row_updates, value, requantize):
                files[entry.file].append(entry)
            continue
        stored = base.dtype_in_out(slot, dtype)
        files[slot.path.name].append(Entry(name, slot.path.name, stored, shape, slot, row_updates, value))
    last = list(files)[-1]
    for name in changes.added:
        value = changes.values[name]
        stored = NAMES[dtype or base.dtype] if value.is_floating_point() else NAMES[value.dtype]
        files[last].append(Entry(name, last, stored, tuple(value.shape), value=value))
    replaced = [n for n in changes.values if n not in changes.added]
    return Plan(base, files, renames, replaced, changes.added, sorted(tied) if untying else [], requantize)


def _requantized(
    base: Base,
    name: str,
    slot: PackedSlot,
    updates: tuple[RowUpdates, ...],
    value: Tensor | None,
    requantize: Requantize,
) -> list[Entry]:
    """Plan a weight that stays quantized: copied, or quantized again if it changes or gets another format; or one that
    becomes ordinary because the other format does not take it.

    Raises AdapterError for a weight that an adapter replaces.
    """
    if value is not None:
        raise AdapterError(
            f"the adapter has a full weight for '{name}', which the base holds quantized\n"
            "  merge without requantize (--requantize), which writes ordinary weights"
        )
    if not updates and requantize.is_same(slot.packed):
        module = name.removesuffix(".weight")
        return [
            Entry(f"{module}.{own}", raw.path.name, raw.dtype, raw.shape, raw) for own, raw in slot.packed.slots.items()
        ]
    packing, source = requantize.packing(name, slot)
    if name in requantize.ordinary:
        # In the dtype of the others: transformers converts none of them when it loads a quantized model.
        return [Entry(name, slot.path.name, NAMES[base.dtype], source.shape, source, updates)]
    return [Entry(name, slot.path.name, "F32", source.shape, source, updates, packing=packing)]


def _same_change(changes: Changes, group: list[str]) -> bool:
    """Whether a group of tied weights all get the same low-rank update (a head's factors are its embedding's,
    transposed).
    """
    found = [change for n in group for changed in changes.updates.get(n, {}).values() for change in changed]
    if len(found) != len(group) or any(n in changes.values for n in group):
        return False
    first = found[0]
    if isinstance(first.update, Tokens):
        return all(
            isinstance(c.update, Tokens)
            and c.update.ids == first.update.ids
            and torch.equal(c.update.weight, first.update.weight)
            and c.weight == first.weight
            for c in found
        )
    halves = []
    for change in found:
        f = change.update.factors
        if f is None or change.update.needs_base:
            return False
        A, B = as_matrices(f.A, f.B)
        left, right = (A.T, B.T) if change.transposed else (B, A)
        halves.append((f.scale * change.weight, left, right))
    scale, left, right = halves[0]
    return all(s == scale and torch.equal(x, left) and torch.equal(y, right) for s, x, y in halves)


def _keep_tied(changes: Changes, ties: Mapping[str, str]) -> None:
    """Raise TargetError unless weights that stay tied get the same update or the same saved weight."""
    values = changes.values
    for holder in dict.fromkeys(ties.values()):
        group = [holder, *(user for user, h in ties.items() if h == holder)]
        touched = [n for n in group if n in changes.touched]
        if not touched:
            continue
        if _same_change(changes, group):
            for n in group[1:]:
                if n not in changes.base.tensors:
                    del changes.updates[n]
            continue
        first = values.get(holder)
        if first is None or any(n in changes.updates or n not in values or not values[n].equal(first) for n in group):
            others = listing([n for n in group if n != touched[0]])
            raise TargetError(
                f"the adapter changes '{touched[0]}', which is one weight with '{others}' in {changes.base.folder} "
                "(tied): merging would change both\n"
                "  untie=True (--untie) gives each a tensor of its own, which makes the checkpoint that much larger; "
                "or keep the adapter unmerged"
            )
        for n in group:
            if n not in changes.base.tensors:
                del values[n]
