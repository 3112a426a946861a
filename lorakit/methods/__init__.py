"""Fine-tuning methods: what is trained and how the result is saved. One file per method, found by its name.

`shared/` holds what several methods do alike.
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
    """List all methods, the default first."""
    return sorted(
        (file.name for file in iter_modules(__path__) if not file.ispkg and file.name != _PROTOCOL),
        key=lambda name: (name != DEFAULT, name),
    )


def method_of(name: str) -> Method:
    """Return the method of this name: the module `methods/<name>.py`."""
    module: Any = import_module(f".{name}", __name__)
    return module
