"""Starts of a LoRA that are not random: one file per start, with the name that `LoraConfig.init` uses."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .start import Start

_OTHERS = ("batches", "matrix", "ranks", "start", "svd")


@cache
def starts() -> tuple[str, ...]:
    """List the starts of this folder."""
    return tuple(sorted(file.name for file in iter_modules(__path__) if file.name not in _OTHERS))


def start_of(init: str) -> Start | None:
    """Return the start that `LoraConfig.init` names; None for a random one, which the layers draw themselves."""
    if init not in starts():
        return None
    start: Start = import_module(f".{init}", __name__).START
    return start
