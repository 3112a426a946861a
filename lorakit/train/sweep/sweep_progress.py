"""Display a sweep: a start panel with its runs, then a bar on a terminal, or plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ...analysis.tables import Table as NamedTable
from ..bar import Bar
from ..run_folder import HELD_OUT, evaluated
from ..task_of_data import reason

if TYPE_CHECKING:
    from ..run import Run

MOST_LISTED = 24  # runs in the start panel
LINES = 20  # printed over an entire sweep, without a terminal


class RunDisplay:
    """Passes one run's metrics on to the sweep's display."""

    def __init__(self, name: str, progress: SweepProgress):
        self.name, self.progress = name, progress

    def row(self, row: dict[str, Any]) -> None:
        """Pass on a line of metrics.jsonl."""
        self.progress.row(self.name, row)

    def sample(self, prompt: str, base: str, tuned: str) -> None:
        """Show nothing: samples are in the run's folder."""

    def drawn(self, step: int, path: Path) -> None:
        """Show nothing: samples are in the run's folder."""

    def note(self, text: str) -> None:
        """Say what the user should know of this run, on stderr."""
        Console(stderr=True).print(Text(f"lorakit: {self.name}: {text}"), soft_wrap=True)


class SweepProgress:
    """Displays a sweep on a console. `quiet`: display nothing; `before`: called before the first output."""

    def __init__(
        self,
        console: Console | None = None,
        quiet: bool = False,
        title: str = "lorakit sweep",
        before: Callable[[], None] = lambda: None,
    ):
        self.console, self.quiet, self.title, self.before = console or Console(stderr=False), quiet, title, before
        self._bar: Bar | None = None
        self._done, self._all, self._active = 0, 0, 0
        self._weight, self._unit, self._since = 0, "tokens", time.perf_counter()
        self._best: tuple[float, str, int] | None = None
        self._ended: set[str] = set()

    def display_of(self, name: str) -> RunDisplay:
        """Return what displays the run `name`."""
        return RunDisplay(name, self)

    def start(self, runs: Sequence[Run], folder: str) -> None:
        """Show the start panel and the bar, whose unit is a step of one run. `folder`: text for the panel."""
        self._all = sum(run.job.steps for run in runs)
        self._done = sum(run.step for run in runs)
        self._active, self._unit = len(runs), runs[0].job.task.unit
        self._note_best(runs)
        if self.quiet:
            return
        self.before()
        self.console.print(
            Panel(
                Group(_shared(runs, folder), Text(), _listed(runs)), title=self.title, title_align="left", expand=False
            )
        )
        if self.console.is_terminal:
            self._bar = Bar(self.console, "steps", self._all, self._done)
        self._since = time.perf_counter()

    def row(self, name: str, row: dict[str, Any]) -> None:
        """Show a line of one run's metrics.jsonl."""
        if (prefix := evaluated(row)) is not None:
            loss = row[f"{prefix}loss"]
            tuned = prefix == HELD_OUT and row["step"] > 0
            if tuned and loss is not None and (self._best is None or loss < self._best[0]):
                self._best = (loss, name, row["step"])
                if self._bar is not None:
                    self._bar.update(self._done, self._facts())
            return
        self._done += 1
        self._weight += row[self._unit]
        if self._bar is not None:
            self._bar.update(self._done, self._facts())
        elif self._done * LINES // self._all > (self._done - 1) * LINES // self._all:
            self._say(f"{self._done:>6}/{self._all} steps  {'  '.join(self._facts())}")

    def ended(self, run: Run) -> None:
        """Show that a run ended, and subtract its remaining steps from the total."""
        name = run.job.adapter
        if name in self._ended:
            return
        self._ended.add(name)
        self._active -= 1
        self._all -= run.job.steps - run.step
        if self._bar is not None:
            self._bar.set_total(self._all)
        if run.failed is not None:
            self._say(f"{name} failed: {run.failed}")
        elif run.step < run.job.steps:
            self._say(
                f"{name} stopped early at step {run.step}: no better held-out loss since step {run.early.best_step}"
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _note_best(self, runs: Sequence[Run]) -> None:
        best_losses = [
            (run.early.best_loss, run.job.adapter, run.early.best_step or 0)
            for run in runs
            if run.early.best_loss is not None
        ]
        self._best = min(best_losses, default=None)

    def _facts(self) -> list[str]:
        """What the bar's line says, the most important first."""
        speed = self._weight / max(1e-9, time.perf_counter() - self._since)
        facts = [f"{self._active} active runs", f"{speed:,.0f} trained {self._unit}/s"]
        if self._best:
            loss, name, step = self._best
            facts.insert(0, f"best {loss:.4f}")
            facts.append(f"by {name} at step {step}")
        return facts

    def _say(self, line: str) -> None:
        if not self.quiet:
            (self._bar.console if self._bar else self.console).print(Text(line), soft_wrap=True)


def _shared(runs: Sequence[Run], folder: str) -> Table:
    """List what all runs have in common."""
    from ...layers.bases import parameter_count
    from ..progress import dtype_name, threads_of

    job = runs[0].job
    base = parameter_count(job.model) - sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    data = dict.fromkeys((r.config.data, len(r.job.train), len(r.job.held_out)) for r in runs)
    table = Table.grid(padding=(0, 2))
    rows = [
        ("model", f"{job.config.model}, {base:,} parameters, {dtype_name(job.dtype.value)} ({job.dtype.reason})"),
        ("device", f"{job.parallel.device}, {threads_of(job.parallel.device)}"),
        *([("task", why)] if (why := reason(job.config, job.train)) else []),
        *(("data", f"{name}: {train:,} rows to train on, {held:,} held out") for name, train, held in data),
        ("runs", f"{len(runs)}, trained together on one base, {sum(r.job.steps for r in runs):,} steps in all"),
        ("folder", folder),
    ]
    if any(run.job.task.packs(run.config) for run in runs):
        rows.append(("note", "rows are not packed in a sweep, where rows of several runs share a batch; same results"))
    rows += [("note", note) for note in dict.fromkeys(run.job.method.note_together(run.config) for run in runs) if note]
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _listed(runs: Sequence[Run]) -> Group:
    rows = []
    for run in runs[:MOST_LISTED]:
        trainable = sum(p.numel() for p in run.parameters.values())
        status = (
            "failed" if run.failed else "finished" if run.ended else f"resuming at step {run.step}" if run.step else ""
        )
        figures = [f"{run.job.rate.value:g}", f"{trainable:,}", str(run.config.batch_size), f"{run.job.steps:,}"]
        rows.append([run.job.adapter, *figures, status])
    heads = ["run", "learning\nrate", "trainable", "batch", "steps", ""]
    more = [Text(f"and {len(runs) - MOST_LISTED} more")] if len(runs) > MOST_LISTED else []
    return Group(NamedTable("", heads, rows), *more)
