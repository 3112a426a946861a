"""The longest row that fits into memory, with gradient checkpointing and offload on and off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from ..errors import LorakitError
from .planner import LONGEST, Planner

# How a run may save memory: in words, gradient checkpointing, and whether what that keeps lies elsewhere.
WAYS = (
    ("all activations kept", False, False),
    ("gradient_checkpointing", True, False),
    ("and offload_activations", True, True),
)


@dataclass(frozen=True)
class Longest:
    """`name`: the planner's; `way`: one of `WAYS`, in words; `tokens`: of one row alone, 0 if none fits; `refused`:
    why such a run cannot save memory in this way, None if it can.
    """

    name: str
    way: str
    tokens: int
    refused: str | None = None


def longest_rows(planners: Iterable[Planner], memory: int) -> list[Longest]:
    """Return the longest row that fits into `memory` bytes, for each planner and way, whatever positions the base has.
    Within two percent. Raises PlanError for a step that does not run even with all activations kept.
    """
    return [_longest(planner, memory, way, *how) for planner in planners for way, *how in WAYS]


def _longest(planner: Planner, memory: int, way: str, checkpointing: bool, offload: bool) -> Longest:
    try:
        tokens = planner.checkpointed(checkpointing, offload).longest(1, memory, beyond=True)
    except LorakitError as error:
        if not checkpointing:
            raise
        return Longest(planner.name, way, 0, str(error).splitlines()[0])  # a prefix is lost there, for example
    return Longest(planner.name, way, tokens)


def table(found: list[Longest], titles: dict[str, str]) -> Table:
    """Build a table with a line for each way and a column for each planner. `titles`: by planner's name."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("longest row, in tokens", no_wrap=True)
    for name in titles:
        made.add_column(titles[name], justify="right")
    for way, *_ in WAYS:
        row = {each.name: each for each in found if each.way == way}
        made.add_row(way, *(_shown(row[name]) for name in titles))
    return made


def _shown(each: Longest) -> str:
    if each.refused is not None:
        return "refused"
    return f"{each.tokens:,}{'+' * (each.tokens >= LONGEST)}" if each.tokens else "none"


def refusals(found: list[Longest]) -> list[str]:
    """Say why runs of the table are refused, a line for each reason."""
    return list(dict.fromkeys(f"refused: {each.refused}" for each in found if each.refused))


def beyond(found: list[Longest], positions: int | None, model: str) -> str | None:
    """Say how to use rows that are longer than the base's positions; None if none is."""
    most = max(each.tokens for each in found)
    if positions is None or most <= positions:
        return None
    return (
        f"{model} has {positions:,} positions; longer rows need them scaled: --rope-scaling yarn:4 gives "
        f"{4 * positions:,}"
    )
