"""The losses of preference training, a file each, found by its name. `preferences/loss.py` says what it offers."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..loss import Loss


def loss_names() -> list[str]:
    """List all losses."""
    return sorted(file.name for file in iter_modules(__path__))


def loss_of(name: str) -> Loss:
    """Return the loss of this name: the module `preferences/losses/<name>.py`."""
    module: Any = import_module(f".{name}", __name__)
    return module
