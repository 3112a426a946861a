"""What the length limit costs: the share of a data set's tokens that it leaves out, and when to ask about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...config import RunSettings
from ...errors import ConfigError, DataError

MOST_UNASKED = 0.01  # share of the tokens that may be left out without `on_long`
NO_LIMIT = 1 << 30  # a max_length that no text reaches


def described(lengths: Sequence[int], limit: int, reason: str, counts: Mapping[str, int], config: RunSettings) -> str:
    """Describe the limit for the start panel, with what was done about longer rows.

    `lengths`: tokens of each row before the limit; `counts`: rows by what was done with them: dropped, cut, split.
    Raises DataError if more than 1 % of the tokens would be left out and `on_long` was not given.
    """
    lost = sum(length for length in lengths if length > limit) if counts.get("dropped") else 0
    lost = sum(length - limit for length in lengths if length > limit) if counts.get("cut") else lost
    share = lost / max(1, sum(lengths))
    if share > MOST_UNASKED and getattr(config, "on_long", "auto") == "auto":
        done = "cut" if counts.get("cut") else "dropped"
        raise DataError(
            f"{config.data}: rows longer than {limit:,} tokens ({reason}) would be {done}, and with them {share:.1%} "
            "of all tokens\n"
            "  say what to do with them, on_long: drop or on_long: cut, or raise max_length (the longest row has "
            f"{max(lengths):,} tokens)"
        )
    rows = "".join(f", {count} {action}" for action, count in counts.items() if count)
    cost = f" ({100 * share:.2g} % of the tokens)" if lost else ""
    most = "of any length" if limit >= NO_LIMIT else f"at most {limit} tokens ({reason})"
    return f"{most}{rows}{cost}"


def check_limit(config: RunSettings) -> None:
    """Raise ConfigError if `max_length` exceeds the model's positions. Only the model's config is read."""
    from .base import blueprint
    from .positions import config_tokens, positions_for

    limit: Any = getattr(config, "max_length", "auto")
    if limit == "auto":
        return
    base = blueprint(config)
    positions, own = positions_for(config, base), config_tokens(config)
    if positions is not None and limit > positions:
        rotary = getattr(base.get_text_config(), "rope_parameters", None) is not None
        scaling = f", or scale its rotary positions: rope_scaling: yarn:{-(-limit // positions)}" if rotary else ""
        raise ConfigError(
            f"max_length: {limit} is more than the {positions} positions of {config.model}"
            f"{f' beside {own} virtual tokens' if own else ''}\n"
            f"  give {positions} or less{scaling}"
        )
