"""How a model is fine-tuned: what is put on it and trained, how the result is saved. One file per method, found by its
name.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .method import Method

DEFAULT = "lora"
_PROTOCOL = "method"


def method_names() -> list[str]:
    """The methods there are, the default first."""
    return sorted(
        (file.name for file in iter_modules(__path__) if file.name != _PROTOCOL),
        key=lambda name: (name != DEFAULT, name),
    )


def method_of(name: str) -> Method:
    """The method of this name: its file."""
    found: Any = import_module(f".{name}", __name__)
    return found
