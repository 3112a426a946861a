"""The progress bar of a run or a sweep: step, loss and time left on one line, at any width of the terminal.

    step 12/300 ━━━━──────────── loss 1.234  343 tokens/s  0.8 GiB  0:00:34  left 0:12:40

In a narrow terminal the bar is shortened and then left out, and so are the last facts, before step and time are.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

TIMES = len(" 0:00:00  left 0:00:00")
BARS = ((120, 40), (90, 20), (60, 10))  # from this many columns on, a bar of this length
# Over the last ten minutes. The time left is not known as long as a single step takes longer, so rich's 30 seconds
# would leave it out for large models on a CPU.
SPEED_SECONDS = 600.0


class Bar:
    """A started bar. `what`: the word before the steps; `total`, `completed`: steps."""

    def __init__(self, console: Console, what: str, total: int, completed: int = 0):
        self.console = console
        self._length = next((length for width, length in BARS if console.width >= width), 0)
        self._what = what
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), MofNCompleteColumn()]
        columns += [BarColumn(self._length)] if self._length else []
        columns += [TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        self._progress = RichProgress(*columns, console=console, speed_estimate_period=SPEED_SECONDS)
        self._task = self._progress.add_task(what, total=total, completed=completed, facts="")
        self._progress.start()

    def update(self, completed: int, facts: Sequence[str] = (), total: int | None = None) -> None:
        """Show the step and as many of the facts, the most important first, as there is room for."""
        steps = total or self._progress.tasks[0].total or 0
        used = len(f"{self._what} {steps:.0f}/{steps:.0f} ") + self._length + TIMES + 1
        shown = fitting(facts, self.console.width - used)
        self._progress.update(self._task, completed=completed, total=total, facts=shown)

    def set_total(self, total: int) -> None:
        """Change the number of steps, when a run has ended early."""
        self._progress.update(self._task, total=total)

    def stop(self) -> None:
        """Leave the bar as it is, and give the cursor back."""
        self._progress.stop()


def fitting(facts: Sequence[str], room: int) -> str:
    """Join the first facts that together have at most `room` characters."""
    line = ""
    for fact in facts:
        longer = f"{line}  {fact}" if line else fact
        if len(longer) > room:
            break
        line = longer
    return line
