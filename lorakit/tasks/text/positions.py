"""How many positions a text has, and whether the longest row fits into them.

Every limit comes from `positions_for`: of rows to train, to evaluate and to predict.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...bases.positions import usable_positions
from ...config import RunSettings, Strict, VirtualTokenSettings, part, virtual_kind
from ...errors import ConfigError, TrainError
from ..task import Item


def config_tokens(config: Strict) -> int:
    """Return the number of virtual tokens that a run trains, or that an adapter has. `config`: of either."""
    return 0 if virtual_kind(config) is None else part(config, VirtualTokenSettings).virtual_tokens


def positions_for(config: RunSettings, base: Any = None, tokens: int = 0) -> int | None:
    """Return the most tokens that a text can have: the base's positions without those of virtual tokens.

    `base`: the model's transformers config, by default read; `tokens`: virtual tokens of adapters that are there
    already, which may be the run's own. None if positions are relative. Raises ConfigError if none are left.
    """
    from .base import blueprint

    positions = usable_positions(blueprint(config) if base is None else base)
    own = max(config_tokens(config), tokens)
    if positions is not None and own >= positions:
        raise ConfigError(
            f"virtual_tokens: {config.model} has {positions} positions, and {own} virtual tokens leave none for a "
            "text\n"
            f"  give {positions - 1} virtual tokens at most"
        )
    return None if positions is None else positions - own


def left_by(config: RunSettings, model: Any) -> int | None:
    """Return `positions_for` of a model, with or without the run's virtual tokens on it."""
    from ...layers.virtual.body import virtual_tokens_of

    return positions_for(config, model.config, virtual_tokens_of(model))


def check_positions(config: RunSettings, model: Any, items: Iterable[Item]) -> None:
    """Raise TrainError if the longest row has more tokens than the model has positions."""
    positions = left_by(config, model)
    own = config_tokens(config)
    longest = max(items, key=lambda item: item.size)
    if positions is not None and longest.size > positions:
        raise TrainError(
            f"{longest.where}: {longest.size} tokens, but {config.model} has {positions} positions"
            f"{f' beside {own} virtual tokens' if own else ''}\n"
            f"  set max_length to {positions} or less; on_long says whether longer rows are dropped, cut or split"
        )
