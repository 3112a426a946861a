"""The tokenizer of a run, with the tokens that it adds, and the base with a row for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...config import RunSettings


def load_extended_tokenizer(config: RunSettings) -> Any:
    """Load the base's tokenizer, with `add_tokens` and a limit scaled as the base's positions. Raises LorakitError."""
    from ...bases.load import load_tokenizer
    from ...bases.rope import stretch
    from ...bases.vocabulary import extend

    tokenizer = load_tokenizer(config.model, config.revision, config.trust_remote_code)
    stretch(tokenizer, getattr(config, "rope_scaling", None))
    if config.add_tokens:
        extend(tokenizer, config.add_tokens, _rows(config), config.model)
    return tokenizer


def check_vocabulary(config: RunSettings, tokenizer: Any, items: Iterable[Any]) -> None:
    """Raise ConfigError if an item has a token that the base has no row for, and none is added."""
    from ...bases.vocabulary import check_tokens

    rows = _rows(config)
    check_tokens(items, max(rows, len(tokenizer)) if config.add_tokens else rows, tokenizer, config.model)


def grow_for(config: RunSettings, model: Any, tokenizer: Any) -> None:
    """Give the base a row for each token of the tokenizer, if the run adds tokens."""
    from ...bases.vocabulary import grow

    if config.add_tokens:
        grow(model, len(tokenizer))


def grow_skeleton(config: RunSettings, base: Any) -> None:
    """Set the vocabulary's size in a base's config, for `lorakit plan`, which may have no tokenizer."""
    if config.add_tokens:
        text = base.get_text_config()
        named = getattr(config, "trainable_tokens", ())
        ids = [
            i for each in (named.values() if isinstance(named, dict) else [named]) for i in each if isinstance(i, int)
        ]
        text.vocab_size = max(text.vocab_size, *(i + 1 for i in ids)) if ids else text.vocab_size


def _rows(config: RunSettings) -> int:
    from ...bases.load import load_config

    rows: int = load_config(config.model, config.revision, config.trust_remote_code).get_text_config().vocab_size
    return rows
