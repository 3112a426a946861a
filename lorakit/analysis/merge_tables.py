"""Show what a merge did: a table of the targets, grouped by kind of module or one by one, and the notes below."""

from __future__ import annotations

import math
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
WORST = 8  # how many weights are listed of those that lost most


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
    yield from _requantized(report, every_module)
    yield from _differences(report, every_module)
    saved = [[name, "replaced"] for name in report.replaced] + [[name, "added"] for name in report.added]
    if saved:
        yield Table("saved weights", ["weight", ""], saved)


def _requantized(report: MergeReport, every: bool) -> Iterator[Table]:
    """What quantizing the merged weights again did, those that kept least of ΔW first."""
    order = sorted(report.requantized, key=lambda r: (r.kept if r.kept is not None else math.inf, -r.error))
    rows = [[r.module, _percent(r.error), _number(r.error_of_change), _percent(r.kept)] for r in order]
    if rows:
        shares = sorted(r.kept for r in report.requantized if r.kept is not None)
        middle = f"; of ΔW {shares[len(shares) // 2]:.1%} kept (median), {shares[0]:.1%} at least" if shares else ""
        title = f"{len(rows)} weights quantized again as {report.dtype}{middle}{_listed(rows, every)}"
        yield Table(title, ["weight", "error", "error\n/ ‖ΔW‖", "ΔW\nkept"], rows if every else rows[:WORST])


def _differences(report: MergeReport, every: bool) -> Iterator[Table]:
    """What quantization had changed of the base, the most changed weights first."""
    order = sorted(report.differences, key=lambda d: -d.relative)
    rows = [[d.module, _percent(d.relative), _number(d.of_change)] for d in order]
    if rows:
        title = f"quantized base Q and unquantized base W{_listed(rows, every)}"
        yield Table(title, ["weight", "‖Q-W‖\n/ ‖W‖", "‖Q-W‖\n/ ‖ΔW‖"], rows if every else rows[:WORST])


def _listed(rows: list[list[str]], every: bool) -> str:
    return "" if every or len(rows) <= WORST else f"; the worst {WORST} of {len(rows)} (--modules lists each)"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}"


def notes(report: MergeReport) -> list[str]:
    """Return what the merge warns of, and which of the base's files it did not copy."""
    unmerged = f"not copied, as other weights than those merged: {listing(report.left_out, 4)}"
    return [*report.warnings, *([unmerged] if report.left_out else [])]
