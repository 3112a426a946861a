"""What a run takes, as plain data: bytes by part at each of its large moments, operations of a step.

peak = the largest of: a training step, an evaluation, a checkpoint
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# In the order of the bars. What each means is said in docs/plan.md.
PARTS = ("weights", "adapter", "optimizer", "best", "gradients", "activations", "loss", "working", "holes", "overhead")
FOUR_BIT = "4-bit "  # before a method's name: the same over a base in 4 bits
STATE_COPIES = {"sgd": 0, "rmsprop": 1, "adam": 2, "adamw": 2}  # of all that is trained


@dataclass(frozen=True)
class Estimate:
    """One configuration. `rows` and `length`: of the micro-batch that is computed at once."""

    method: str  # "lora", "full", "4-bit lora"
    rows: int
    length: int
    parameters: int  # of the base
    trained: int  # parameters
    trained_bytes: int
    moments: dict[str, dict[str, int]]  # "step", "evaluation", "checkpoint": bytes by part
    flops: int  # of forward and backward of one micro-batch

    @property
    def peak(self) -> str:
        """The largest moment."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the largest moment, in the order of `PARTS`."""
        return {part: self.moments[self.peak].get(part, 0) for part in PARTS}

    @property
    def total(self) -> int:
        """Bytes at the largest moment."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"peak": self.peak, "parts": self.parts, "total": self.total}
