"""An estimate as plain data: bytes by part for a training step, an evaluation and a checkpoint, and a step's FLOPs.

peak = the largest of the three
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# In the order of the bars. docs/plan.md explains each.
PARTS = ("weights", "adapter", "optimizer", "best", "gradients", "activations", "loss", "working", "holes", "overhead")


@dataclass(frozen=True)
class Estimate:
    """The estimate of one configuration. `rows` and `length` (tokens): of the micro-batch computed at once."""

    method: str  # "lora", "full", "nf4 lora"
    storage: str | None  # how the base's linears are stored: "nf4"; None: not quantized
    rows: int
    length: int
    parameters: int  # elements of the base's parameters
    trained: int  # elements of the trained parameters
    trained_bytes: int
    moments: dict[str, dict[str, int]]  # "step", "evaluation", "checkpoint": bytes by part
    flops: int  # forward and backward of one micro-batch

    @property
    def peak(self) -> str:
        """Which of "step", "evaluation" and "checkpoint" needs most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak, in the order of `PARTS`."""
        return {part: self.moments[self.peak].get(part, 0) for part in PARTS}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and properties, for JSON."""
        return asdict(self) | {"peak": self.peak, "parts": self.parts, "total": self.total}
