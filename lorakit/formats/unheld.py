"""What a format cannot hold of an adapter, one line each: the cases that several formats share."""

from __future__ import annotations

from collections.abc import Mapping

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..adapter.virtual_tokens import BODY
from ..config import EXPERTS
from ..errors import listing


def other_kinds(adapter: Adapter, *held: str) -> list[str]:
    """Updates of kinds that the format does not hold. `held`: the `variant` of each kind that it holds. A DoRA needs
    its own and that of the update it is built on.
    """
    updates = {m: u for m, u in adapter.updates.items() if not {u.variant, u.without_base().variant} <= {*held}}
    tokens = [m for m, u in updates.items() if u.variant == "tokens"]
    with_base = [m for m, u in updates.items() if u.variant == "dora"]
    experts = [m for m, u in updates.items() if u.variant == EXPERTS]
    apart = {*tokens, *with_base, *experts, BODY}
    multiplied = [m for m, u in updates.items() if u.needs_base and m not in apart]
    others = [m for m in updates if m not in apart and m not in multiplied]
    lines = []
    for kind in dict.fromkeys(updates[m].variant for m in multiplied):
        own = [m for m in multiplied if updates[m].variant == kind]
        alone = updates[own[0]].unmergeable() is not None
        fix = "only lorakit's own folder (peft) holds them" if alone else "merge the adapter into its base instead"
        lines.append(f"{len(own)} updates of kind {kind} ({listing(own, 2)}): {fix}")
    if BODY in updates:
        lines.append(f"virtual tokens, which only PEFT's files hold: adapter.prune(['{BODY}']) is the rest alone")
    if others:
        lines.append(f"{len(others)} updates of another kind ({listing(others, 2)}): resize converts them to factors")
    if with_base:
        lines.append(
            f"DoRA's magnitude of {len(with_base)} modules ({listing(with_base, 2)}): merge it into its base instead"
        )
    if experts:
        lines.append(
            f"factors of each expert for {len(experts)} weights ({listing(experts, 2)}), which only PEFT's files hold: "
            "merge the adapter into its base instead"
        )
    if tokens:
        lines.append(f"trained tokens of {listing(tokens, 2)}: merge the adapter into its base instead")
    return lines


def part_dora(updates: Mapping[str, Update], format: str) -> list[str]:
    """For formats whose config has one setting for all modules: some of these modules are DoRA and others are not."""
    dora = [m for m, u in updates.items() if u.variant == "dora"]
    if len(dora) in (0, len(updates)):
        return []
    return [
        f"DoRA's magnitude of {len(dora)} modules ({listing(dora, 2)}): in {format} either all modules are DoRA or none"
    ]


def embeddings(adapter: Adapter) -> list[str]:
    """Textual-inversion embeddings."""
    tokens = adapter.embeddings
    return [f"{len(tokens)} textual-inversion embeddings ({listing(tokens, 2)})"] if tokens else []


def convolutions(adapter: Adapter, why: str = "") -> list[str]:
    """Low-rank updates of convolutions. `why`: the rest of the line."""
    modules = [m for m, f in adapter.factors.items() if f.kind == "conv"]
    return [f"{len(modules)} convolutions ({listing(modules, 2)}){why}"] if modules else []


def beside_updates(adapter: Adapter) -> list[str]:
    """Saved weights and textual-inversion embeddings, for formats that hold updates of modules alone."""
    lines = []
    if adapter.saved:
        lines.append(f"{len(adapter.saved)} saved weights: {listing(adapter.saved)}")
    if adapter.embeddings:
        lines.append(f"{len(adapter.embeddings)} textual-inversion embeddings: {listing(adapter.embeddings)}")
    return lines
