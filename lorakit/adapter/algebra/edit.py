"""Edit an adapter: scale, negate, cast, prune, select, rename. Each function returns a new adapter.

w · ΔW     |w| goes into alpha and its sign into B, so that no element is rounded
           (negation: task arithmetic, Ilharco et al. 2023)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from ...config.kinds import KindSettings
from ...errors import AdapterError, ConfigError, TargetError, did_you_mean, listing
from ...module_names import matches
from ..adapter import Adapter
from ..checks import narrowed
from ..update import Update
from .reform import with_updates

T = TypeVar("T")


def scale(adapter: Adapter, weight: float) -> Adapter:
    """Multiply every ΔW by `weight`. Raises AdapterError if the adapter has saved weights or a DoRA, which cannot be
    scaled; ConfigError if `weight` is not finite.
    """
    if not math.isfinite(weight):
        raise ConfigError(f"an adapter cannot be scaled by {weight}; expected a finite number")
    if weight == 1:
        return adapter
    if adapter.saved:
        raise AdapterError(
            f"this adapter has saved weights ({listing(adapter.saved, 3)}): they are values, not changes, and cannot "
            "be scaled\n"
            "  lorakit.combine([a, b], [0.7, 0.3], saved='mean') (lorakit combine --weights 0.7,0.3 --saved mean) "
            "takes their mean; "
            "dataclasses.replace(adapter, saved={}) leaves them out"
        )
    return with_updates(adapter, {m: u.times(weight, m) for m, u in adapter.updates.items()})


def negate(adapter: Adapter) -> Adapter:
    """Negate every ΔW. Errors as `scale` raises them."""
    return scale(adapter, -1.0)


def as_lora(adapter: Adapter) -> Adapter:
    """Return the adapter with plain LoRA in place of kinds that are one of the same rank in other tensors: VeRA. ΔW
    stays; the other updates too.
    """
    plain = {m: u.as_lora() for m, u in adapter.updates.items() if u.factors is None}
    found = {m: f for m, f in plain.items() if f is not None}
    if not found:
        return adapter
    config = adapter.config.replace(variant="lora", **KindSettings().model_dump())  # without VeRA's own settings
    return with_updates(adapter, {**adapter.updates, **found}, config=config)


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return the adapter in another dtype. Raises AdapterError, naming the tensor, if a value is too large for it."""

    def converted(m: str, update: Update) -> Update:
        return update.map(lambda name, t: narrowed(t, dtype, f"'{m}', {name}"))

    return replace(
        adapter,
        updates={m: converted(m, u) for m, u in adapter.updates.items()},
        saved={n: narrowed(t, dtype, f"saved weight '{n}'") for n, t in adapter.saved.items()},
        embeddings={n: narrowed(t, dtype, f"embedding '{n}'") for n, t in adapter.embeddings.items()},
    )


def prune(adapter: Adapter, drop: str | list[str]) -> Adapter:
    """Return the adapter without the modules that `drop` names and their saved weights. `drop`: name endings, or one
    regular expression for full names. Raises TargetError if an ending matches no module, or no module is left.
    """
    dropped = _named(adapter, drop)
    return _only(adapter, lambda m: m not in dropped)


def select(adapter: Adapter, keep: str | list[str]) -> Adapter:
    """Return the adapter with only the modules that `keep` names. Names and errors are as in `prune`."""
    kept = _named(adapter, keep)
    return _only(adapter, lambda m: m in kept)


def rename(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """Return the adapter with other module names. `names`: a full name or a prefix, cut at a dot ("" matches all) ->
    its replacement.

    The longest match counts. Raises AdapterError if two modules would get the same name; TargetError for an entry that
    matches none.
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
            f"no module's name is or starts with '{idle}'{did_you_mean(idle, adapter.updates)}\n"
            f"  modules: {listing(adapter.updates, 3)}"
        )
    return with_updates(adapter, updates, saved=saved)


def _named(adapter: Adapter, names: str | list[str]) -> set[str]:
    """Return the modules that match the endings or the regular expression. Raises TargetError for one that matches
    none.
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


def _only(adapter: Adapter, keeps: Callable[[str], bool]) -> Adapter:
    saved = {n: t for n, t in adapter.saved.items() if keeps(n.rpartition(".")[0])}
    updates = {m: u for m, u in adapter.updates.items() if keeps(m)}
    if not updates and not saved and not adapter.embeddings:
        raise TargetError(f"nothing would be left of this adapter's {len(adapter.updates)} modules")
    left = [s for s in adapter.config.save_modules if any(f".{s}." in f".{n}" for n in saved)]
    return with_updates(adapter, updates, saved=saved, config=adapter.config.replace(save_modules=left))


def _unique(new: Mapping[str, str], values: Mapping[str, T]) -> dict[str, T]:
    """Return the values under their new names."""
    result: dict[str, T] = {}
    for old, name in new.items():
        if name in result or not name:
            twin = next((o for o, n in new.items() if n == name and o != old), old)
            raise AdapterError(
                f"'{old}' would be named '{name}'" + (f", the name of '{twin}'" if name else ", an empty name")
            )
        result[name] = values[old]
    return result
