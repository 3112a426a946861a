"""TensorBoard and Weights & Biases, if installed and asked for. `metrics.jsonl` is written whatever is asked."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..errors import TrainError
from .config import TrainConfig


def check_trackers(config: TrainConfig) -> None:
    """TrainError if one that is asked for is not installed."""
    for name in config.track:
        if importlib.util.find_spec(name) is None:
            raise TrainError(f"track: {name} is not installed\n  pip install 'lorakit[{name}]', or leave it out")


class Trackers:
    """Logs numbers to what `config.track` names."""

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
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
