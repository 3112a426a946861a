"""`MergeReport`: what a merge changed, measured on the files it wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


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
class Requantized:
    """What quantizing one merged weight did: ‖Q' - (W + ΔW)‖ over ‖W + ΔW‖ and over ‖ΔW‖, and the share of ΔW kept, all
    explained in `requantize`. Those that depend on ΔW are None if nothing changed the weight.
    """

    module: str
    error: float
    error_of_change: float | None
    kept: float | None

    def within(self, component: str) -> Requantized:
        """Return a copy with a pipeline's component in front of the name."""
        return replace(self, module=f"{component}.{self.module}") if component else self


@dataclass(frozen=True)
class Difference:
    """What quantization had changed of one weight: ‖Q - W‖ / ‖W‖, and ‖Q - W‖ / ‖ΔW‖ if the adapter changes it."""

    module: str
    relative: float
    of_change: float | None

    def within(self, component: str) -> Difference:
        """Return a copy with a pipeline's component in front of the name."""
        return replace(self, module=f"{component}.{self.module}") if component else self


@dataclass(frozen=True)
class MergeReport:
    base: str
    adapter: str
    out: str
    dtype: str  # of most of the written weights; the kind of quantization, if weights were quantized again
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
    dequantized: int = 0  # quantized weights of the base that are ordinary ones in OUT
    requantized: tuple[Requantized, ...] = ()
    differences: tuple[Difference, ...] = ()  # between the quantized base and the one that the adapter is merged onto

    @property
    def largest(self) -> float:
        """The largest |written - base| of any target."""
        return max((t.applied for t in self.targets), default=0.0)

    def headline(self) -> str:
        """Return the result in one sentence, with the time it took."""
        return f"{self.outcome()} in {self.seconds:.1f} s"

    def outcome(self) -> str:
        """Return the result in one sentence."""
        # What rounding to a few values wrote says little about ΔW.
        largest = max((t.asked for t in self.targets), default=0.0) if self.requantized else self.largest
        parts = [f"{len(self.targets)} targets merged, largest |ΔW| {largest:.3g}"]
        parts += [
            f"{len(names)} weights {what}"
            for names, what in ((self.replaced, "replaced"), (self.added, "added"))
            if names
        ]
        dtype = "ordinary ones" if self.requantized else self.dtype
        parts += [f"{self.dequantized} quantized weights written as {dtype}"] if self.dequantized else []
        parts += [f"{len(self.requantized)} weights quantized again as {self.dtype}"] if self.requantized else []
        same = f"{self.untouched} other tensors {f'rounded to {self.dtype}' if self.converted else 'byte-identical'}"
        return "; ".join([*parts, same, f"{self.bytes / 1e6:,.1f} MB"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {**asdict(self), "largest": self.largest, "headline": self.headline()}
