"""Tasks: how rows become items, items a loss, and a model's quality a number. One file per task, found by its name.

`text/` holds what text tasks share. Nothing here knows of the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .task import Task

DEFAULT = "causal_lm"
_PROTOCOL = "task"


def task_names() -> list[str]:
    """List all tasks, the default first."""
    files = [file.name for file in iter_modules(__path__) if not file.ispkg and file.name != _PROTOCOL]
    return sorted(files, key=lambda name: (name != DEFAULT, name))


def task_of(name: str) -> Task:
    """Return the task of this name: the module `tasks/<name>.py`."""
    module: Any = import_module(f".{name}", __name__)
    return module


def task_for(peft_type: str | None) -> str | None:
    """Return the name of the task with this PEFT task_type, None if there is none.

    Of several that share it, the first: SEQ_CLS is classification, though regression has that type too.
    """
    return next((name for name in task_names() if task_of(name).peft_type == peft_type), None)


def task_of_adapter(peft_type: str | None, metadata: Mapping[str, Any]) -> str | None:
    """Return the name of the task that an adapter was trained for; None if that is not known.

    `metadata`: the adapter's. The recipe of lorakit's own run names the task; `peft_type` (the adapter's
    `config.task`) decides for adapters of others.
    """
    recipe = metadata.get("recipe")
    if isinstance(recipe, Mapping):
        name = recipe.get("task", DEFAULT)  # a recipe leaves out defaults
        if name in task_names() and task_of(str(name)).peft_type == peft_type:
            return str(name)
    return task_for(peft_type)


def recognizing(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Return the names of the tasks that data with such a row can be of. `rows`: its first rows, with this one."""
    return [name for name in task_names() if task_of(name).recognizes(row, rows)]
