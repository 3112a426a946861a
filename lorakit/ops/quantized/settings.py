"""Read the values of a checkpoint's `quantization_config`, which people edit and many programs write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import LorakitError


def whole_number(config: Mapping[str, Any], default: int | None, *keys: str) -> int:
    """Return the first of these settings that the config has, or `default`.

    Raises LorakitError for a value that is no whole number, and if there is neither a setting nor a default.
    """
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        unquoted = f", {value} without quotes" if isinstance(value, str) and value.lstrip("-").isdigit() else ""
        raise LorakitError(f"{_stated(key, value)}\n  expected a whole number{unquoted}")
    return value


def group_size(config: Mapping[str, Any], *keys: str) -> int:
    """Return how many inputs share a scale: 128 where a config does not say, -1 (all of them) for null and 0.

    Raises LorakitError for anything but a positive whole number, or -1.
    """
    key = next((key for key in keys if key in config), keys[0])
    if config.get(key, 128) is None:
        return -1
    size = whole_number(config, 128, key) or -1
    if size < -1:
        raise LorakitError(f"{_stated(key, size)}\n  expected a positive number, or -1 for one group")
    return size


def switch(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a setting that is true or false; `default` if it is not set. Raises LorakitError for another value."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise LorakitError(f"{_stated(key, value)}\n  expected true or false")
    return value


def _stated(key: str, value: Any) -> str:
    return f"quantization_config.{key} is {value!r}"
