"""Rows against the positions that a model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import RunSettings
from ...errors import TrainError
from ...generate.generate import positions_of
from ..task import Item


def check_positions(config: RunSettings, model: Any, items: Sequence[Item]) -> None:
    """TrainError if the longest row does not fit."""
    positions = positions_of(model)
    longest = max(items, key=lambda item: item.size)
    if positions is not None and longest.size > positions:
        raise TrainError(
            f"{longest.where}: {longest.size} tokens, and {config.model} has {positions} positions\n"
            f"  set max_length to {positions} or less; what becomes of longer rows is set by on_long"
        )
