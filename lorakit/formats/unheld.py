"""Lines for what a format cannot hold, in the words that all formats share."""

from __future__ import annotations

from ..adapter.adapter import Adapter
from ..errors import listing


def other_kinds(adapter: Adapter) -> list[str]:
    """LoHa, LoKr, whole ΔW."""
    others = adapter.others
    return (
        [f"{len(others)} updates of another kind ({listing(others, 2)}): resize makes factors of them"]
        if others
        else []
    )


def learned_tokens(adapter: Adapter) -> list[str]:
    tokens = adapter.embeddings
    return [f"{len(tokens)} learned tokens ({listing(tokens, 2)})"] if tokens else []


def convolutions(adapter: Adapter, why: str = "") -> list[str]:
    found = [m for m, f in adapter.factors.items() if f.kind == "conv"]
    return [f"{len(found)} convolutions ({listing(found, 2)}){why}"] if found else []


def magnitudes(adapter: Adapter) -> list[str]:
    """DoRA's."""
    found = [m for m, u in adapter.updates.items() if u.variant == "dora"]
    return (
        [f"DoRA's magnitude of {len(found)} modules ({listing(found, 2)}): merge it into its base instead"]
        if found
        else []
    )
