"""The interface of a start: what A and B are before the first step (`LoraConfig.init`).

    ΔW = s · (B A - B₀ A₀)      if the start is `subtracted`: A = A₀ and B = B₀ at first, so that ΔW is zero
    ΔW = s · B A                otherwise

Each start is the object `START` of a file in this folder. It sees a module's weight as a matrix W [out, in·k]
(`matrix.Matrix`), so that one file serves linears, Conv1D, convolutions, embeddings and parts of packed projections.

PEFT subtracts s · B₀ A₀ from the base's weights instead. The sum is the same, but then the base alone is another model,
other adapters on it are wrong, and the adapter's file is of no use without the changed base.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...config import LoraConfig
from ...errors import TargetError
from .batches import FirstBatches
from .matrix import Matrix

LINEAR, WITH_CONV, EVERY = (
    frozenset({"linear"}),
    frozenset({"linear", "conv"}),
    frozenset({"linear", "conv", "embedding"}),
)


@dataclass(frozen=True)
class Evidence:
    """What a start is made from besides the weights. `original`: module name -> its weight before quantization, stored
    as in the checkpoint, or None where that weight is not quantized.
    """

    batches: FirstBatches | None = None
    original: Callable[[str], Tensor | None] | None = None


@dataclass(frozen=True)
class Gathered:
    """`config`: with the ranks that the start chose; `found`: module -> what `factors` needs of it. A module that it
    lacks keeps its random start; `dropped`: module -> why it gets no update.
    """

    config: LoraConfig
    found: Mapping[str, Any]
    dropped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A module, or one part of a packed projection. `rows`: its rows of the matrix W [out, in·k]."""

    name: str
    matrix: Matrix
    rows: slice
    rank: int
    scale: float

    def W(self) -> Tensor:
        """Read these rows of W, in float32 (float64 stays)."""
        return self.matrix.read()[self.rows]

    def check_rank(self, needed: int, why: str = "") -> None:
        """Raise TargetError if the part's W has fewer than `needed` singular values."""
        out, size_in = self.matrix.shape
        out = len(range(*self.rows.indices(out)))
        if needed > min(out, size_in):
            lower = min(out, size_in) * self.rank // needed
            fix = (
                f"give it a lower rank: rank_pattern={{'{self.name}': {lower}}}"
                if lower
                else f"leave it out: exclude=['{self.name}']"
            )
            raise TargetError(
                f"'{self.name}' is a matrix of {out} x {size_in}, which has no {needed} singular vectors for rank "
                f"{self.rank}{why} (LoraConfig.init)\n  {fix}"
            )


class Start(ABC):
    """A start. It holds no state."""

    kinds: ClassVar[frozenset[str]] = EVERY  # of layers for which it is defined
    subtracted: ClassVar[bool] = False
    needs_batches: ClassVar[bool] = False
    needs_originals: ClassVar[bool] = False

    def gather(self, matrices: Mapping[str, Matrix], config: LoraConfig, evidence: Evidence) -> Gathered:
        """Compute what needs all modules at once, or the evidence. `matrices`: the modules to adapt, by name."""
        return Gathered(config, dict.fromkeys(matrices))

    @abstractmethod
    def factors(self, part: Part, found: Any) -> tuple[Tensor, Tensor]:
        """Return A [rank, in·k] and B [rows, rank]. `found`: what `gather` found for the module. Raises TargetError for
        a module that cannot start so.
        """
