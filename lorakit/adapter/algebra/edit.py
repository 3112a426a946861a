"""Small changes of an adapter, each a new one: stronger or weaker, turned around, in another precision, fewer modules,
other names.

w · ΔW     in alpha where w > 0, so that no factor changes; the sign goes into B
           (negation: task arithmetic, Ilharco et al. 2023)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from ...errors import AdapterError, ConfigError, TargetError, did_you_mean, listing
from ...module_names import matches
from ..adapter import Adapter
from ..checks import narrowed
from ..update import Update
from .reform import with_updates

T = TypeVar("T")


def scale(adapter: Adapter, weight: float) -> Adapter:
    """Every ΔW times `weight`. AdapterError with weights saved whole, and for a DoRA: neither is a change that could be
    scaled.
    """
    if not math.isfinite(weight):
        raise ConfigError(f"an adapter cannot be scaled by {weight}")
    if weight == 1:
        return adapter
    if adapter.saved:
        raise AdapterError(
            f"this adapter holds weights whole ({listing(adapter.saved, 3)}): they are values, not changes, and cannot "
            "be scaled\n"
            "  lorakit.combine([a, b], [0.7, 0.3], saved='mean') (lorakit combine --weights 0.7,0.3 --saved mean) "
            "takes their mean; "
            "dataclasses.replace(adapter, saved={}) leaves them out"
        )
    return with_updates(adapter, {m: u.times(weight, m) for m, u in adapter.updates.items()})


def negate(adapter: Adapter) -> Adapter:
    """The adapter that undoes this one."""
    return scale(adapter, -1.0)


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """In another precision. AdapterError, naming the module, where a number is too large for it."""

    def moved(m: str, update: Update) -> Update:
        return update.map(lambda name, t: narrowed(t, dtype, f"'{m}', {name}"))

    return replace(
        adapter,
        updates={m: moved(m, u) for m, u in adapter.updates.items()},
        saved={n: narrowed(t, dtype, f"saved weight '{n}'") for n, t in adapter.saved.items()},
        embeddings={n: narrowed(t, dtype, f"learned token '{n}'") for n, t in adapter.embeddings.items()},
    )


def prune(adapter: Adapter, drop: str | list[str]) -> Adapter:
    """Without the modules that `drop` names (name endings, or one regular expression for whole names), and what they
    saved whole.
    """
    gone = _named(adapter, drop)
    return _only(adapter, lambda m: m not in gone)


def select(adapter: Adapter, keep: str | list[str]) -> Adapter:
    """With only the modules that `keep` names."""
    kept = _named(adapter, keep)
    return _only(adapter, lambda m: m in kept)


def rename(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """Modules under other names. `names`: a module's name, or what some begin with (whole parts, or "" for all) -> what
    it becomes.

    The longest that fits counts. AdapterError if two modules would get one name; TargetError for an entry that fits
    none.
    """
    used: set[str] = set()

    def new(name: str) -> str:
        old = max((o for o in names if not o or name == o or name.startswith(f"{o}.")), key=len, default=None)
        if old is None:
            return name
        used.add(old)
        rest = name[len(old) :].removeprefix(".")
        return ".".join(part for part in (names[old].removesuffix("."), rest) if part)

    updates = _unique({m: new(m) for m in adapter.updates}, adapter.updates)
    saved = _unique({n: new(n) for n in adapter.saved}, adapter.saved)
    idle = next((o for o in names if o not in used), None)
    if idle is not None:
        raise TargetError(
            f"no module is named '{idle}' or begins so{did_you_mean(idle, adapter.updates)}\n"
            f"  modules: {listing(adapter.updates, 3)}"
        )
    return with_updates(adapter, updates, saved=saved)


def _named(adapter: Adapter, names: str | list[str]) -> set[str]:
    """The modules that a list of endings or an expression names; TargetError for an ending, or the expression, that
    names none.
    """
    known = set(adapter.updates) | {n.rpartition(".")[0] for n in adapter.saved}
    for pattern in [names] if isinstance(names, str) else [[n] for n in names]:
        if not any(matches(m, pattern) for m in known):
            asked = pattern if isinstance(pattern, str) else pattern[0]
            raise TargetError(
                "no module of this adapter matches "
                f"'{asked}'{did_you_mean(asked, {m.rpartition('.')[2] for m in known})}"
            )
    return {m for m in known if matches(m, names)}


def _only(adapter: Adapter, wanted) -> Adapter:
    saved = {n: t for n, t in adapter.saved.items() if wanted(n.rpartition(".")[0])}
    updates = {m: u for m, u in adapter.updates.items() if wanted(m)}
    if not updates and not saved and not adapter.embeddings:
        raise TargetError(f"nothing would be left of this adapter's {len(adapter.updates)} modules")
    left = [s for s in adapter.config.save_modules if any(f".{s}." in f".{n}" for n in saved)]
    return with_updates(adapter, updates, saved=saved, config=adapter.config.replace(save_modules=left))


def _unique(new: Mapping[str, str], values: Mapping[str, T]) -> dict[str, T]:
    """The values under their new names."""
    result: dict[str, T] = {}
    for old, name in new.items():
        if name in result or not name:
            twin = next((o for o, n in new.items() if n == name and o != old), old)
            raise AdapterError(
                f"'{old}' would be named '{name}'" + (f", as '{twin}' is" if name else ", which is no name")
            )
        result[name] = values[old]
    return result
