"""Early stopping on the held-out loss, with state that a checkpoint can store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EarlyStop:
    """Tracks the best held-out loss. `patience`: evaluations without a better one before stopping; 0 never stops.

    `since`: evaluations since the best one.
    """

    patience: int
    best_loss: float | None = None
    best_step: int | None = None
    since: int = 0

    def better(self, loss: float, step: int) -> bool:
        """Record an evaluation. Returns whether its loss is the best so far."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.since = loss, step, 0
            return True
        self.since += 1
        return False

    @property
    def stop(self) -> bool:
        """Whether to stop now."""
        return self.patience > 0 and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: all fields but `patience`, which may change."""
        return {k: v for k, v in asdict(self).items() if k != "patience"}
