"""Check that the longest row fits into the model's positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...config import RunSettings, VirtualTokenSettings, part, virtual_kind
from ...errors import TrainError
from ...generate.generate import positions_of
from ..task import Item


def config_tokens(config: RunSettings) -> int:
    """Return the number of virtual tokens that a run trains."""
    return 0 if virtual_kind(config) is None else part(config, VirtualTokenSettings).virtual_tokens


def check_positions(config: RunSettings, model: Any, items: Iterable[Item]) -> None:
    """Raise TrainError if the longest row has more tokens than the model has positions."""
    positions = positions_of(model)
    own = config_tokens(config)
    positions = None if positions is None else positions - own
    longest = max(items, key=lambda item: item.size)
    if positions is not None and longest.size > positions:
        raise TrainError(
            f"{longest.where}: {longest.size} tokens, but {config.model} has {positions} positions"
            f"{f' beside {own} virtual tokens' if own else ''}\n"
            f"  set max_length to {positions} or less; on_long says whether longer rows are dropped, cut or split"
        )
