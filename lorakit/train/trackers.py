"""Log to TensorBoard and Weights & Biases if configured. `metrics.jsonl` is always written."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..errors import TrainError
from .config import TrainConfig


def check_trackers(config: TrainConfig) -> None:
    """Raise TrainError if a configured tracker is not installed."""
    for name in config.track:
        if importlib.util.find_spec(name) is None:
            raise TrainError(f"track: {name} is not installed\n  pip install 'lorakit[{name}]', or omit it")


class Trackers:
    """Logs metrics to the trackers in `config.track`."""

    def __init__(self, config: TrainConfig):
        self._board: Any = None
        self._wandb: Any = None
        if "tensorboard" in config.track:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(config.out)
        if "wandb" in config.track:
            import wandb

            self._wandb = wandb.init(project="lorakit", name=config.out, dir=config.out, config=config.model_dump())

    def log(self, row: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl: all its numbers, by the row's "step"."""
        metrics = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(metrics, step=row["step"])

    def close(self) -> None:
        """Flush and close all trackers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
