"""Which columns rows have, where a task can be known by them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Columns of rows that a language model is trained on.
OF_LANGUAGE_MODELS = frozenset(
    {"prompt", "completion", "messages", "conversations", "instruction", "chosen", "rejected"}
)
_WHOLE = re.compile(r"[+-]?[0-9]+")
_MEASURE = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def is_labelled(row: Mapping[str, Any]) -> bool:
    """Whether a row has a text and something to predict for it, and nothing else to learn from."""
    return {"text", "label"} <= row.keys() and isinstance(row["text"], str) and not OF_LANGUAGE_MODELS & row.keys()


def is_measure(label: Any) -> bool:
    """Whether a label is written as measured numbers are: 3.8 or 4.0, or "3.800" in a table."""
    return isinstance(label, float) or (isinstance(label, str) and _MEASURE.fullmatch(label.strip()) is not None)


def is_fraction(label: Any) -> bool:
    """Whether a label is a number between whole ones, which no class has as its number: 3.8, not 4.0."""
    return is_measure(label) and not float(label).is_integer()


def may_be_classes(labels: Iterable[Any]) -> bool:
    """Whether labels, of which None is none, can be classes: names or whole numbers, as far as they are known."""
    known = [label for label in labels if label is not None]
    usable = bool(known) and all(isinstance(label, str | int | float) for label in known)
    return usable and not (any(map(is_fraction, known)) and all(map(_is_number, known)))


def may_be_measures(labels: Iterable[Any]) -> bool:
    """Whether labels, of which None is none, can be measures: numbers, of which one at least is written as 3.8 or 4.0.

    Numbers such as 0.0 and 1.0 alone may be classes too: tables often write them so.
    """
    known = [label for label in labels if label is not None]
    return any(map(is_measure, known)) and all(map(_is_number, known))


def is_truth(label: Any) -> bool:
    """Whether a label may say that an answer is desirable or not, without being a truth value: 0, 1, "True"."""
    return not isinstance(label, bool) and str(label).strip().lower() in ("0", "1", "0.0", "1.0", "true", "false")


def _is_number(label: Any) -> bool:
    whole = isinstance(label, str) and _WHOLE.fullmatch(label.strip()) is not None
    return whole or type(label) is int or is_measure(label)
