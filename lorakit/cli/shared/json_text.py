"""Results as JSON that every reader takes: JSON has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any) -> str:
    """Return plain data as JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def is_finite(value: Any) -> bool:
    """Whether no number in plain data is NaN or infinite."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value if is_finite(value) else None
