"""How many positions a base has for a sequence, by its transformers config."""

from __future__ import annotations

from typing import Any

# Models whose positions begin after the padding token's id, so that a table of 514 rows is for 512 tokens.
_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def usable_positions(base: Any) -> int | None:
    """Return the most tokens of a sequence; None if positions are relative or not limited. `base`: the config."""
    text = base.get_text_config()
    rows: int | None = getattr(text, "max_position_embeddings", None)
    after = getattr(text, "model_type", None) in _AFTER_PADDING and text.pad_token_id is not None
    return rows - text.pad_token_id - 1 if rows is not None and after else rows
