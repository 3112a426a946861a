"""What a model is to learn: rows to items, items to losses, and how well it does. One file per task, found by its name.

What tasks on text share is in `text/`. Nothing here knows of the training loop.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .task import Task

DEFAULT = "causal_lm"
_PROTOCOL = "task"


def task_names() -> list[str]:
    """The tasks there are, the default first."""
    files = [file.name for file in iter_modules(__path__) if not file.ispkg and file.name != _PROTOCOL]
    return sorted(files, key=lambda name: (name != DEFAULT, name))


def task_of(name: str) -> Task:
    """The task of this name: its file."""
    found: Any = import_module(f".{name}", __name__)
    return found


def task_for(peft_type: str | None) -> str | None:
    """The name of the task that PEFT's task_type means; None where there is none of it."""
    return next((name for name in task_names() if task_of(name).peft_type == peft_type), None)
