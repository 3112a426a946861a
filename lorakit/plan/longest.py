"""The longest row that fits into memory, with gradient checkpointing and offload on and off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from .planner import LONGEST, Planner

# How a run may save memory: in words, gradient checkpointing, and whether what that keeps lies elsewhere.
WAYS = (
    ("all activations kept", False, False),
    ("gradient_checkpointing", True, False),
    ("and offload_activations", True, True),
)


@dataclass(frozen=True)
class Longest:
    """`name`: the planner's; `way`: one of `WAYS`, in words; `tokens`: of one row alone, 0 if none fits."""

    name: str
    way: str
    tokens: int


def longest_rows(planners: Iterable[Planner], memory: int) -> list[Longest]:
    """Return the longest row that fits into `memory` bytes, for each planner and way, whatever positions the base has.
    Within two percent. Raises PlanError.
    """
    return [
        Longest(planner.name, way, planner.checkpointed(*how).longest(1, memory, beyond=True))
        for planner in planners
        for way, *how in WAYS
    ]


def table(found: list[Longest], titles: dict[str, str]) -> Table:
    """Build a table with a line for each way and a column for each planner. `titles`: by planner's name."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("longest row, in tokens")
    for name in titles:
        made.add_column(titles[name], justify="right")
    for way, *_ in WAYS:
        row = {each.name: each.tokens for each in found if each.way == way}
        made.add_row(way, *(f"{row[name]:,}{'+' * (row[name] >= LONGEST)}" if row[name] else "none" for name in titles))
    return made


def beyond(found: list[Longest], positions: int | None, model: str) -> str | None:
    """Say how to use rows that are longer than the base's positions; None if none is."""
    most = max(each.tokens for each in found)
    if positions is None or most <= positions:
        return None
    return (
        f"{model} has {positions:,} positions; longer rows need them scaled: --rope-scaling yarn:4 gives "
        f"{4 * positions:,}"
    )
