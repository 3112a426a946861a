"""Check that the longest row fits into the model's positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...config import RunSettings
from ...errors import TrainError
from ...generate.generate import positions_of
from ..task import Item


def check_positions(config: RunSettings, model: Any, items: Iterable[Item]) -> None:
    """Raise TrainError if the longest row has more tokens than the model has positions."""
    positions = positions_of(model)
    longest = max(items, key=lambda item: item.size)
    if positions is not None and longest.size > positions:
        raise TrainError(
            f"{longest.where}: {longest.size} tokens, but {config.model} has {positions} positions\n"
            f"  set max_length to {positions} or less; on_long says whether longer rows are dropped, cut or split"
        )
