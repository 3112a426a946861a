"""What a merge did, as measured on the files it wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TargetReport:
    """One target: `rank`, of all its updates together; `asked`, the largest |ΔW|; `applied`, the largest |written -
    base|; `changed`, the share of its numbers that differ.
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    rank: int
    asked: float
    applied: float
    changed: float

    def within(self, component: str) -> TargetReport:
        """The same, with a pipeline's component in front of the names."""
        return (
            replace(self, module=f"{component}.{self.module}", tensor=f"{component}.{self.tensor}")
            if component
            else self
        )

    @property
    def lost(self) -> bool:
        """Whether its whole update was below the precision it was written in."""
        return self.asked > 0 and self.changed == 0


@dataclass(frozen=True)
class MergeReport:
    base: str
    adapter: str
    out: str
    dtype: str  # what most of the weights are written as
    converted: bool  # whether that differs from the base
    targets: tuple[TargetReport, ...]
    replaced: tuple[str, ...]  # weights that the adapter saved whole
    added: tuple[str, ...]  # such weights that the base did not have
    untied: tuple[str, ...]  # weights that were one and are now apart
    untouched: int  # tensors that are the base's own: to the byte, or rounded to `dtype`
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
        """One sentence."""
        parts = [f"{len(self.targets)} targets merged, largest |ΔW| {self.largest:.3g}"]
        parts += [
            f"{len(names)} weights {what}"
            for names, what in ((self.replaced, "replaced"), (self.added, "added"))
            if names
        ]
        same = f"{self.untouched} other tensors {f'rounded to {self.dtype}' if self.converted else 'byte-identical'}"
        return "; ".join([*parts, same, f"{self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "largest": self.largest, "headline": self.headline()}
