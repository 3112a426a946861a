"""Show what a merge did: a table of the targets, grouped by kind of module or one by one, and the notes below."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import listing
from .heatmap import kind_of_module
from .tables import Table

if TYPE_CHECKING:
    from ..checkpoint.merge_report import MergeReport, TargetReport

_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")  # all experts of a layer are one kind
GROUPED = "targets by kind of module (--modules lists each)"


def tables(report: MergeReport, every_module: bool = False) -> Iterator[Table]:
    """Tables of the merged targets and of the weights that the adapter saved in full."""
    groups: dict[tuple[str, tuple[int, ...], int], list[TargetReport]] = {}
    for target in report.targets:
        name = target.module if every_module else _EXPERT.sub("*", kind_of_module(target.module))
        groups.setdefault((name, target.shape, target.rank), []).append(target)
    rows = [
        [
            name,
            str(len(group)),
            "x".join(map(str, shape)),
            str(rank),
            f"{max(t.asked for t in group):.3g}",
            f"{max(t.applied for t in group):.3g}",
            f"{sum(t.changed for t in group) / len(group):.1%}",
        ]
        for (name, shape, rank), group in groups.items()
    ]
    heads = ["target", "count", "shape", "rank", "largest\n|ΔW|", "written", "elements\nchanged"]
    if every_module:
        rows, heads = [[row[0], *row[2:]] for row in rows], [heads[0], *heads[2:]]
    if rows:
        yield Table("" if every_module else GROUPED, heads, rows)
    saved = [[name, "replaced"] for name in report.replaced] + [[name, "added"] for name in report.added]
    if saved:
        yield Table("saved weights", ["weight", ""], saved)


def notes(report: MergeReport) -> list[str]:
    """Return what the merge warns of, and which of the base's files it did not copy."""
    unmerged = f"not copied, as other weights than those merged: {listing(report.left_out, 4)}"
    return [*report.warnings, *([unmerged] if report.left_out else [])]
