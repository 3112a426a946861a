"""The mean loss of rows that a task labels, such as the pictures of a class, beside the loss of all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tasks.task import Item, Task, weight_of
from .parallel import Parallel


class Labelled:
    """Sums up the losses of a step's rows by label. `batch`: the rows of all processes."""

    def __init__(self, task: Task, batch: Sequence[Item], parallel: Parallel):
        self._task, self._parallel = task, parallel
        rows: dict[str, list[Item]] = {}
        for item, label in zip(batch, task.loss_labels(batch), strict=True):
            if label:
                rows.setdefault(label, []).append(item)
        self._weights = {label: weight_of(items) for label, items in sorted(rows.items())}
        self._sums = {label: torch.zeros((), device=parallel.device) for label in self._weights}

    def add(self, items: Sequence[Item], losses: Tensor, weight: float, factors: Tensor | None) -> None:
        """Take in the losses of some rows, which have been multiplied by `weight`, and by `factors` [rows] if given."""
        if self._sums and weight:
            losses = losses / weight if factors is None else losses / (weight * factors)
            for label, loss in zip(self._task.loss_labels(items), losses, strict=True):
                if label:
                    self._sums[label] += loss

    def means(self) -> dict[str, float]:
        """Return the mean loss of each label, over all processes, by the name to log it under."""
        if not self._sums:
            return {}
        sums = self._parallel.mean(torch.stack(list(self._sums.values()))) * self._parallel.world
        return {f"{label}_loss": value / weight for (label, weight), value in zip(self._weights.items(), sums.tolist())}
