"""What OUT will hold, decided before a byte is written: each tensor, where it comes from, and what is done to it.

copied      its bytes, as they are
updated     W + ΔW, for the target of a low-rank update
replaced    a weight that the adapter saved whole, in place of the base's; or added, where the base has none
untied      a tensor of its own for a weight that was stored once and used twice
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.factors import Factors
from ..errors import AdapterError, LorakitError, TargetError, listing
from ..formats.stream import DTYPES, MERGEABLE, NAMES, Slot
from ..ops.delta import as_matrices, delta_rows
from .base import Base
from .names import Renaming, find_renaming
from .ties import declared, find_ties

# transformers' models with Conv1D, a linear stored as [in, out], and what those layers are called.
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True)
class Update:
    """ΔW of one tensor. A [r, -1] and B [out, r] as matrices of float32 (or float64)."""

    module: str
    A: Tensor
    B: Tensor
    scale: float
    transposed: bool
    rank: int

    def rows(self, rows: slice) -> Tensor:
        return delta_rows(self.A, self.B, self.scale, rows, self.transposed)

    @property
    def zero(self) -> bool:
        return not (self.A.any() and self.B.any())


@dataclass(frozen=True)
class Entry:
    """One tensor of OUT."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    source: Slot | None = None  # what it starts from
    update: Update | None = None
    value: Tensor | None = None  # what it is instead

    @property
    def nbytes(self) -> int:
        if self.dtype in DTYPES:
            return math.prod(self.shape) * DTYPES[self.dtype].itemsize
        assert self.source is not None
        return self.source.nbytes

    @property
    def copied(self) -> bool:
        return self.update is None and self.value is None


@dataclass(frozen=True)
class Plan:
    files: Mapping[str, list[Entry]]
    rename: Renaming
    replaced: list[str]
    added: list[str]
    untied: list[str]

    @property
    def entries(self) -> list[Entry]:
        return [entry for entries in self.files.values() for entry in entries]


def make_plan(base: Base, adapter: Adapter, dtype: torch.dtype | None, untie: bool) -> Plan:
    """Raises TargetError or AdapterError for whatever of the adapter does not fit the base; nothing is left out in silence."""
    for module, update in adapter.updates.items():
        if not isinstance(update, Factors) or update.magnitude is not None:
            kind = "DoRA" if isinstance(update, Factors) else type(update).__name__
            raise AdapterError(
                f"'{module}' has a {kind} update, which merge does not take yet\n  adapter.resize(rank=...) makes low-rank factors of LoHa, LoKr and whole updates"
            )
    targets = [f"{module}.weight" for module in adapter.factors]
    # Only what lies outside the numbered layers can be tied; the common adapter need not know.
    pairs = {} if all(_numbered(n) for n in (*targets, *adapter.saved)) else declared(base)
    wanted = targets or [n for n in adapter.saved if _numbered(n)]
    rename = find_renaming([pairs.get(n, n) if n not in base.tensors else n for n in wanted], base.tensors, base.folder)
    ties = find_ties(base, pairs, rename)
    updates, values, added = _locate(base, adapter, rename, ties)
    if not values and all(u.zero for u in updates.values()):
        raise AdapterError("the adapter's update is zero everywhere, so there is nothing to merge\n  was it saved before training?")
    tied = {*ties, *ties.values()}
    untying = untie and any(n in tied for n in (*updates, *values))
    if not untying:
        _keep_tied(updates, values, ties, base)
    own = [user for user in ties if user not in base.tensors] if untying else []
    sources = {**base.tensors, **{user: base.tensors[ties[user]] for user in own}}
    files: dict[str, list[Entry]] = {file: [] for file in base.shards}
    for name, slot in sources.items():
        stored = NAMES[dtype] if dtype is not None and slot.dtype in MERGEABLE else slot.dtype
        files[slot.path.name].append(Entry(name, slot.path.name, stored, slot.shape, slot, updates.get(name), values.get(name)))
    last = list(files)[-1]
    for name in added:
        value = values[name]
        stored = NAMES[dtype or base.dtype] if value.is_floating_point() else NAMES[value.dtype]
        files[last].append(Entry(name, last, stored, tuple(value.shape), value=value))
    return Plan(files, rename, [n for n in values if n not in added], added, sorted(tied) if untying else [])


def _locate(
    base: Base, adapter: Adapter, rename: Renaming, ties: Mapping[str, str]
) -> tuple[dict[str, Update], dict[str, Tensor], list[str]]:
    """(updates, whole weights) by the files' names, and those of the whole weights that the files lack."""
    updates: dict[str, Update] = {}
    values: dict[str, Tensor] = {}
    added: list[str] = []

    def here(name: str) -> str | None:
        return next((n for n in (rename(name), name) if n in base.tensors or n in ties), None)

    def slot_of(name: str) -> Slot:
        return base.tensors[name if name in base.tensors else ties[name]]

    def check_once(name: str, own: str) -> None:
        if name in updates or name in values:
            raise AdapterError(f"the adapter changes the base's '{name}' twice, the second time as '{own}'\n  expected one change a weight")

    for module, factors in adapter.factors.items():
        name = here(f"{module}.weight")
        assert name is not None, "find_renaming found every target"
        check_once(name, f"{module}.weight")
        updates[name] = update_for(module, factors, slot_of(name), base.model_type)
    for own, value in adapter.saved.items():
        at = here(own)
        if at is None:
            _check_new(own, base, rename)
            at = rename(own) if rename.old else own
            added.append(at)
        elif value.shape != slot_of(at).shape:
            raise AdapterError(
                f"saved weight '{own}' has shape {list(value.shape)}; the base's has {list(slot_of(at).shape)}\n"
                "  was its vocabulary resized? resize the base alike (model.resize_token_embeddings) and save it first"
            )
        check_once(at, own)
        values[at] = value
    return updates, values, added


def _numbered(name: str) -> bool:
    """Whether a weight is part of a numbered layer."""
    return any(part.isdigit() for part in name.split("."))


def update_for(module: str, f: Factors, slot: Slot, model_type: str = "") -> Update:
    """The factors as an update of a stored weight. AdapterError where their shapes do not meet."""
    if slot.dtype not in MERGEABLE:
        raise LorakitError(
            f"'{module}' is stored as {slot.dtype} (quantized?), which cannot take a low-rank update\n  merge into the unquantized base"
        )
    if f.A.shape[0] != f.B.shape[1]:
        raise AdapterError(
            f"'{module}' carries PEFT's grouped form, whose A reads across the convolution's groups: no change of its weight does the same\n"
            "  keep this adapter unmerged"
        )
    plain = (f.B.shape[0], *f.A.shape[1:])  # [out, in] or [out, in/g, *k]
    across = (f.A.shape[1], f.B.shape[0])  # Conv1D's [in, out], an embedding's [vocab, dim]
    if f.kind == "linear" and slot.shape == plain == across:
        known = model_type in CONV1D_MODELS and module.rsplit(".", 1)[-1] in CONV1D_LAYERS
        transposed = f.transposed or known
    else:
        transposed = f.kind != "conv" and slot.shape == across and (f.kind == "embedding" or slot.shape != plain)
        if not transposed and (f.kind == "embedding" or slot.shape != plain):
            expected = across if f.kind == "embedding" or f.transposed else plain
            raise AdapterError(
                f"'{module}' has a weight of {list(slot.shape)} in the base; the adapter's factors (A {list(f.A.shape)}, B {list(f.B.shape)}) "
                f"are for {list(expected)}\n  is it an adapter for another model, or one of another size?"
            )
    return Update(module, *as_matrices(f.A, f.B), f.scale, transposed, f.rank)


def _check_new(name: str, base: Base, rename: Renaming) -> None:
    """A saved weight that the base lacks may be a fresh head, but not a part of something that the base has."""
    renamed = rename(name)
    module = renamed.rpartition(".")[0]
    beside = [t for t in base.tensors if t.rpartition(".")[0] == module]
    alike = [t for t in base.tensors if t.endswith(f".{name}") or name.endswith(f".{t}")]
    if beside or alike:
        what = f"its '{module}' has only {listing(beside, 3)}" if beside else f"it has {listing(alike, 3)}"
        raise TargetError(f"saved weight '{name}' is not in {base.folder}; {what}\n  is it an adapter for another model?")


def _keep_tied(updates: Mapping[str, Update], values: dict[str, Tensor], ties: Mapping[str, str], base: Base) -> None:
    """Weights that stay one can only change as one: TargetError unless the adapter saved the same whole weight for all of them."""
    for holder in dict.fromkeys(ties.values()):
        group = [holder, *(user for user, h in ties.items() if h == holder)]
        touched = [n for n in group if n in updates or n in values]
        if not touched:
            continue
        first = values.get(holder)
        if first is None or any(n in updates or n not in values or not values[n].equal(first) for n in group):
            others = listing([n for n in group if n != touched[0]])
            raise TargetError(
                f"the adapter changes '{touched[0]}', which is one weight with '{others}' in {base.folder} (tied): merging would change both\n"
                "  untie=True (--untie) gives each a tensor of its own, which makes the checkpoint that much larger; or keep the adapter unmerged"
            )
        for n in group:
            if n not in base.tensors:
                del values[n]
