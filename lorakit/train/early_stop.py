"""Early stopping on held-out loss, as state that a checkpoint can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EarlyStop:
    """The best held-out loss so far and how many evaluations ago it was. `patience` 0 never stops."""

    patience: int
    best_loss: float | None = None
    best_step: int | None = None
    since: int = 0

    def better(self, loss: float, step: int) -> bool:
        """Note an evaluation; whether it is the best so far."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.since = loss, step, 0
            return True
        self.since += 1
        return False

    @property
    def stop(self) -> bool:
        return self.patience > 0 and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "patience"}
