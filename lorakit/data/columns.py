"""Which columns rows have, where a task can be known by them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Columns of rows that a language model is trained on.
OF_LANGUAGE_MODELS = frozenset(
    {"prompt", "completion", "messages", "conversations", "instruction", "chosen", "rejected"}
)
_MEASURE = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def is_labelled(row: Mapping[str, Any]) -> bool:
    """Whether a row has a text and something to predict for it, and nothing else to learn from."""
    return {"text", "label"} <= row.keys() and isinstance(row["text"], str) and not OF_LANGUAGE_MODELS & row.keys()


def is_measure(label: Any) -> bool:
    """Whether a label is a measured number rather than a name or a class: 3.8, or "3.800" in a table."""
    return isinstance(label, float) or (isinstance(label, str) and _MEASURE.fullmatch(label.strip()) is not None)
