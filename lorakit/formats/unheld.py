"""Lines for what a format cannot hold, in the words that all formats share."""

from __future__ import annotations

from collections.abc import Mapping

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..errors import listing


def other_kinds(adapter: Adapter, *held: str) -> list[str]:
    """The updates of other kinds than the format holds. `held`: the `variant` of each kind that it does hold. A DoRA
    needs two: its own, and that of the update it is built on.
    """
    updates = {m: u for m, u in adapter.updates.items() if not {u.variant, u.without_base().variant} <= {*held}}
    with_base = [m for m, u in updates.items() if u.needs_base]
    others = [m for m in updates if m not in with_base]
    lines = []
    if others:
        lines.append(f"{len(others)} updates of another kind ({listing(others, 2)}): resize makes factors of them")
    if with_base:
        lines.append(
            f"DoRA's magnitude of {len(with_base)} modules ({listing(with_base, 2)}): merge it into its base instead"
        )
    return lines


def part_dora(updates: Mapping[str, Update], format: str) -> list[str]:
    """For formats with one setting for all modules: that some of these modules are DoRA and others are not."""
    dora = [m for m, u in updates.items() if u.variant == "dora"]
    if len(dora) in (0, len(updates)):
        return []
    return [
        f"DoRA's magnitude of {len(dora)} modules ({listing(dora, 2)}): in {format} all modules have one or none has"
    ]


def learned_tokens(adapter: Adapter) -> list[str]:
    tokens = adapter.embeddings
    return [f"{len(tokens)} learned tokens ({listing(tokens, 2)})"] if tokens else []


def convolutions(adapter: Adapter, why: str = "") -> list[str]:
    found = [m for m, f in adapter.factors.items() if f.kind == "conv"]
    return [f"{len(found)} convolutions ({listing(found, 2)}){why}"] if found else []


def beside_updates(adapter: Adapter) -> list[str]:
    """Weights saved whole and learned tokens, for formats that hold updates of modules alone."""
    lines = []
    if adapter.saved:
        lines.append(f"{len(adapter.saved)} weights saved whole: {listing(adapter.saved)}")
    if adapter.embeddings:
        lines.append(f"{len(adapter.embeddings)} learned tokens: {listing(adapter.embeddings)}")
    return lines
