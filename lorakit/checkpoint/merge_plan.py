"""Plan OUT before a byte is written: each tensor, where it comes from and how it is made.

copied      the base's bytes
updated     W + Σ wᵢ ΔWᵢ; only some rows of a tensor that several modules share
replaced    an adapter's saved weight instead of the base's; added, if the base has none
untied      a separate tensor for a weight that was stored once and used twice
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.tokens import Tokens
from ..errors import TargetError, listing
from ..io.stream import DTYPES, MERGEABLE, NAMES, Slot
from ..ops.delta import as_matrices
from .base import Base
from .change import Change
from .changes import Changes
from .experts import as_stored
from .locate import locate
from .renaming import Renaming


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
    replaces it instead.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    source: Slot | None = None
    updates: tuple[RowUpdates, ...] = ()
    value: Tensor | None = None

    @property
    def slot(self) -> Slot:
        """`source`, which every entry without a `value` has."""
        assert self.source is not None
        return self.source

    @property
    def nbytes(self) -> int:
        """The tensor's size in OUT, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else self.slot.nbytes

    @property
    def copied(self) -> bool:
        """Whether the base's values stay (possibly in another dtype)."""
        return not self.updates and self.value is None

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
    """All of OUT. `renames`: one for each adapter, from its names to the files'."""

    base: Base
    files: Mapping[str, list[Entry]]
    renames: list[Renaming]
    replaced: list[str]
    added: list[str]
    untied: list[str]

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


def make_plan(base: Base, adapters: Sequence[tuple[float, Adapter]], dtype: torch.dtype | None, untie: bool) -> Plan:
    """Plan the merge of adapters with their weights. `untie`: separate tied weights that change.

    Raises TargetError or AdapterError for every part of an adapter that does not fit the base.
    """
    changes, renames = Changes(base), []
    ties: dict[str, str] = {}
    for weight, given in adapters:
        stored = as_stored(base, given.updates)
        adapter = replace(given, updates={m: u for own in stored.values() for m, u in own.items()})
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
        stored = NAMES[dtype] if dtype is not None and slot.dtype in MERGEABLE else slot.dtype
        row_updates = tuple(
            RowUpdates(start, stop, tuple(us)) for (start, stop), us in sorted(changes.updates.get(name, {}).items())
        )
        value = changes.values.get(name)
        shape = slot.shape if value is None else tuple(value.shape)  # more rows, where tokens were added
        files[slot.path.name].append(Entry(name, slot.path.name, stored, shape, slot, row_updates, value))
    last = list(files)[-1]
    for name in changes.added:
        value = changes.values[name]
        stored = NAMES[dtype or base.dtype] if value.is_floating_point() else NAMES[value.dtype]
        files[last].append(Entry(name, last, stored, tuple(value.shape), value=value))
    replaced = [n for n in changes.values if n not in changes.added]
    return Plan(base, files, renames, replaced, changes.added, sorted(tied) if untying else [])


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
