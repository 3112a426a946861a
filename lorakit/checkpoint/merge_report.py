"""`MergeReport`: what a merge changed, measured on the files it wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import listing

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TargetReport:
    """One target. `rank`: the sum of its updates' ranks; `asked`: the largest |ΔW|; `applied`: the largest |written -
    base|; `changed`: the share of its elements that differ.
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    rank: int
    asked: float
    applied: float
    changed: float

    def within(self, component: str) -> TargetReport:
        """Return a copy with a pipeline's component in front of the names."""
        return (
            replace(self, module=f"{component}.{self.module}", tensor=f"{component}.{self.tensor}")
            if component
            else self
        )

    @property
    def below_precision(self) -> bool:
        """Whether all of its ΔW was below the precision it was written in."""
        return self.asked > 0 and self.changed == 0


@dataclass(frozen=True)
class MergeReport:
    base: str
    adapter: str
    out: str
    dtype: str  # of most of the written weights
    converted: bool  # whether that differs from the base
    targets: tuple[TargetReport, ...]
    replaced: tuple[str, ...]  # by the adapter's saved weights
    added: tuple[str, ...]  # saved weights that the base did not have
    untied: tuple[str, ...]  # tied weights that are now separate
    untouched: int  # tensors with the base's values: to the byte, or rounded to `dtype`
    tensors: int
    bytes: int  # of all tensors
    left_out: tuple[str, ...]  # files of the base that were not copied: other weights, adapters
    warnings: tuple[str, ...]
    seconds: float

    @property
    def largest(self) -> float:
        """The largest |written - base| of any target."""
        return max((t.applied for t in self.targets), default=0.0)

    def headline(self) -> str:
        """Return the result in one sentence, with the time it took."""
        return f"{self.outcome()} in {self.seconds:.1f} s"

    def outcome(self) -> str:
        """Return the result in one sentence."""
        parts = [f"{len(self.targets)} targets merged, largest |ΔW| {self.largest:.3g}"]
        parts += [
            f"{len(names)} weights {what}"
            for names, what in ((self.replaced, "replaced"), (self.added, "added"))
            if names
        ]
        same = f"{self.untouched} other tensors {f'rounded to {self.dtype}' if self.converted else 'byte-identical'}"
        return "; ".join([*parts, same, f"{self.bytes / 1e6:,.1f} MB"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {**asdict(self), "largest": self.largest, "headline": self.headline()}

    def table(self) -> Table:
        """Build a rich table: a row for each target, the warnings below."""
        from rich import box
        from rich.table import Table

        notes = [
            *self.warnings,
            *(
                [f"not copied, as other weights than those merged: {listing(self.left_out, 4)}"]
                if self.left_out
                else []
            ),
        ]
        table = Table(
            box=box.SIMPLE,
            title=self.headline(),
            title_justify="left",
            caption="\n".join(notes) or None,
            caption_justify="left",
        )
        table.add_column("target", overflow="fold")
        for column in ("shape", "rank", "largest |ΔW|", "written", "changed"):
            table.add_column(column, justify="right")
        for t in self.targets:
            style = "yellow" if t.below_precision else None
            shape = "x".join(map(str, t.shape))
            table.add_row(
                t.module, shape, str(t.rank), f"{t.asked:.3g}", f"{t.applied:.3g}", f"{t.changed:.1%}", style=style
            )
        for name in self.replaced:
            table.add_row(name, "", "", "", "replaced", "")
        for name in self.added:
            table.add_row(name, "", "", "", "added", "")
        return table
