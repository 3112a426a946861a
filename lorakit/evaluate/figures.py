"""A task's own figures (loss, accuracy, ...) on the same rows, of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..model.activate import activate
from ..tasks.task import Base, Item, Task

if TYPE_CHECKING:
    from rich.table import Table

MODEL = "model"


def figures(
    task: Task, base: Base, items: Sequence[Item], adapters: Sequence[str], batch_size: int
) -> list[dict[str, Any]]:
    """One row of figures for each adapter, or for the model where there is none: a base without an adapter has no
    trained head.
    """
    found = []
    for name in adapters:
        activate(base.model, name)
        found.append({"adapter": name, **task.evaluate(base, items, batch_size), "rows": len(items)})
    return found or [{"adapter": None, **task.evaluate(base, items, batch_size), "rows": len(items)}]


def table(found: Sequence[dict[str, Any]]) -> Table:
    """For a console."""
    from rich.table import Table as RichTable
    from rich.text import Text

    names = [name for name in found[0] if name not in ("adapter", "rows")]
    made = RichTable(title=f"{found[0]['rows']:,} rows")
    made.add_column("")
    for name in names:
        made.add_column(name.replace("_", " "), justify="right")
    for row in found:
        made.add_row(Text(row["adapter"] or MODEL), *(f"{row[name]:.4f}" for name in names))
    return made
