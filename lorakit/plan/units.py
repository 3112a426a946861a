"""Parse and format amounts of memory: `24GB` is 24 · 10⁹ bytes, `24GiB` is 24 · 2³⁰."""

from __future__ import annotations

import re

from ..errors import ConfigError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_DECIMAL = ("B", "KB", "MB", "GB", "TB")


def parse_bytes(text: str) -> int:
    """Parse an amount of memory into bytes. Raises ConfigError if `text` is not one."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    unit = unit if unit in _UNITS or not unit else unit + "B"  # 24G is 24GB; a bare 24 is ambiguous
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"'{text}' is not an amount of memory; expected a positive number with a unit, such as 24GB or 16GiB"
        )
    return int(float(match[1]) * _UNITS[unit])


def show_bytes(size: float) -> str:
    """Format bytes with three digits and a decimal unit: 1.28 GB."""
    power = 0
    while power < len(_DECIMAL) - 1 and abs(size) >= 999.5:
        size, power = size / 1000, power + 1
    return f"{size:.0f} {_DECIMAL[power]}" if power == 0 or abs(size) >= 99.5 else f"{size:.3g} {_DECIMAL[power]}"
