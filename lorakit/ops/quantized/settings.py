"""Read the values of a checkpoint's `quantization_config`, which people edit and many programs write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import LorakitError


def whole_number(config: Mapping[str, Any], method: str, default: int | None, *keys: str) -> int | None:
    """Return the first of these settings that the config has, or `default`. `method`: the config's, for the error.

    Raises LorakitError for a value that is no whole number. None is one that is not set.
    """
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise LorakitError(_wrong(method, key, value, f"a whole number{_without_quotes(value)}"))
        return value
    return default


def group_size(config: Mapping[str, Any], method: str, default: int, *keys: str) -> int:
    """Return how many inputs share a scale, -1 for all of them. A key that is there and null means all.

    Raises LorakitError for anything but a positive whole number, or -1.
    """
    stated = [key for key in keys if key in config]
    size = whole_number(config, method, -1 if stated else default, *keys)
    assert size is not None
    if size < 1 and size != -1:
        raise LorakitError(_wrong(method, stated[0], size, "a positive number, or -1 for one group"))
    return size


def switch(config: Mapping[str, Any], method: str, default: bool, key: str) -> bool:
    """Return a setting that is true or false; `default` if it is not set. Raises LorakitError for another value."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise LorakitError(_wrong(method, key, value, "true or false"))
    return value


def _wrong(method: str, key: str, value: Any, expected: str) -> str:
    return f"{method} weights with {key} {value!r} (quantization_config.{key} in config.json)\n  expected {expected}"


def _without_quotes(value: Any) -> str:
    return f", {value} without quotes" if isinstance(value, str) and value.lstrip("-").isdigit() else ""
