"""Display a run: a start panel with every choice and its reason, then a bar on a terminal, or plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..bases.device import choose_device, peak_memory
from ..config.quantization import FOUR_BITS
from ..layers.bases import parameter_count
from ..layers.fused.fused import ATTENTION, report
from ..model.summary import summary
from . import defaults
from .bar import Bar
from .optimizer import describe
from .resume import trainable
from .run_folder import HELD_OUT, evaluated
from .task_of_data import reason

if TYPE_CHECKING:
    from .config import TrainConfig
    from .setup import Job

INDENT = 10  # of samples: below the text of the line with their step


class Average:
    """An exponential moving average of losses, mₜ = β mₜ₋₁ + (1 - β) lossₜ, as mₜ / (1 - βᵗ): without the bias towards
    m₀ = 0 (Kingma and Ba 2015, section 3). About the last 10 steps count.
    """

    BETA = 0.9

    def __init__(self, losses: Iterable[float] = ()):
        self._sum, self._weight = 0.0, 0.0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> float:
        """Take in the next loss. Returns the average."""
        self._sum = self.BETA * self._sum + (1 - self.BETA) * loss
        self._weight = self.BETA * self._weight + (1 - self.BETA)
        return self._sum / self._weight


class Progress:
    """Displays a run on a console. `quiet`: display nothing; `before`: called before the first output."""

    def __init__(self, console: Console | None = None, quiet: bool = False, before: Callable[[], None] = lambda: None):
        self.console = console or Console(stderr=False)
        self.quiet, self.before = quiet, before
        self._bar: Bar | None = None
        self._sampled: tuple[str, str] | None = None
        self._average = Average()
        self._done, self._unit, self._since, self._every = 0, "tokens", time.perf_counter(), 1
        self._steps = 0

    def start(self, job: Job, step: int) -> None:
        """Show the start panel and the bar. `step`: 0, or where the run resumes."""
        self._steps, self._every, self._unit = job.steps, max(1, job.steps // 20), job.task.unit
        self._average = Average(row["loss"] for row in job.folder.rows() if "loss" in row)
        if self.quiet or not job.parallel.is_first:
            self.quiet = True
            return
        self.before()
        self.console.print(Panel(_panel(job, step), title="lorakit train", title_align="left", expand=False))
        if self.console.is_terminal:
            self._bar = Bar(self.console, "step", job.steps, step)
        self._since = time.perf_counter()

    def row(self, row: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if self.quiet:
            return
        if prefix := evaluated(row):
            figures = {name.removeprefix(prefix): value for name, value in row.items() if name != "step"}
            what = "held-out" if prefix == HELD_OUT else "fixed noise:"
            base = ", the base" if row["step"] == 0 else ""
            shown = "  ".join(_figure(name, value) for name, value in figures.items())
            self._say(f"step {row['step']:>5}  {what} {shown}{base}")
            return
        average = self._average.add(row["loss"])
        self._done += row[self._unit]
        speed = self._done / max(1e-9, time.perf_counter() - self._since)
        loss, facts = f"loss {row['loss']:.3f}", [f"{speed:,.0f} trained {self._unit}/s", _memory()]
        if self._bar is not None:
            self._bar.update(row["step"], [loss, f"average {average:.3f}", *facts])
        elif row["step"] % self._every == 0:
            left = (self._steps - row["step"]) * row["seconds"] / row["step"]
            line = "  ".join([f"{loss} (average {average:.3f})", *facts, f"{left:.0f} s left"])
            self._say(f"step {row['step']:>5}/{self._steps}  {line}")

    def sample(self, prompt: str, base: str, tuned: str) -> None:
        """Show a prompt with both answers. Those that the base gave are not shown again at each evaluation."""
        if self.quiet:
            return
        table = Table.grid(padding=(0, 1, 0, 0))
        again, self._sampled = self._sampled == (prompt, base), (prompt, base)
        for name, text in [("tuned", tuned)] if again else [("prompt", prompt), ("base", base), ("tuned", tuned)]:
            table.add_row(" " * INDENT, f"{name:<6}", Text(_short(text)))
        self._console.print(table)

    def drawn(self, step: int, path: Path) -> None:
        """Say where pictures have been drawn."""
        if not self.quiet:
            self._say(f"step {step:>5}  drawn {path}")

    def note(self, text: str) -> None:
        """Say what the user should know, on stderr, also if all else is quiet."""
        Console(stderr=True).print(Text(f"lorakit: {text}"), soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    @property
    def _console(self) -> Console:
        """Prints above the bar, if there is one."""
        return self._bar.console if self._bar else self.console


def _panel(job: Job, step: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts(job, step):
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def facts(job: Job, step: int = 0) -> list[tuple[str, str]]:
    """List what was chosen for a run and why, by name. `step`: where it resumes, 0 if it does not."""
    config, data = job.config, job.data
    trained = sum(p.numel() for p in trainable(job.model, job.adapter).values())
    total = parameter_count(job.model)
    device = job.parallel.device
    processes = job.parallel.world
    accumulate = -(-config.batch_size // (job.micro_batch.value * processes))
    if job.method.keeps_base:  # of a sweep's adapters, this one alone counts
        base = total - sum(p.numel() for p in job.model.parameters() if p.requires_grad)
        total = base + trained
    else:
        base = total
    rows = [
        (
            "model",
            f"{config.model}, {base:,} parameters, {dtype_name(job.dtype.value)} ({job.dtype.reason}){_packed(config)}",
        ),
        (
            "device",
            f"{device} ({_why(device)}), {processes} process{'es' if processes > 1 else ''}, {threads_of(device)}",
        ),
        ("adapter", f"{job.method.trained(config)}, {trained:,} trainable ({_short_number(100 * trained / total)} %)"),
        *_reached(job),
        *([("task", why)] if (why := reason(config, job.train)) else []),
        ("data", f"{config.data}: {len(job.train):,} rows to train on, {len(job.held_out):,} held out, {data.shape}"),
        *data.facts,
        (
            "batch",
            f"{config.batch_size} = {job.micro_batch.value} x {accumulate} accumulated x {processes} "
            f"({job.micro_batch.reason})",
        ),
        *([("packing", job.packed)] if job.packed else []),
        *([("memory", job.memory.reason)] if job.memory else []),
        *([("compiled", job.compiled)] if job.compiled else []),
        *_fused(job),
        (
            "steps",
            f"{job.steps:,} ({_short_number(job.steps / defaults.steps_per_epoch(config, job.data.rows))} passes "
            "over the data)" + (f", longer than the {job.steps_before:,} planned before" if job.steps_before else ""),
        ),
        ("optimizer", describe(config, job.model, trainable(job.model, job.adapter))),
        ("learning rate", f"{job.rate.value:g} ({job.rate.reason}), {config.schedule}, warm-up {config.warmup:.0%}"),
        ("folder", str(job.folder.path) + (f", resuming at step {step}" if step else "")),
    ]
    return [*rows, *(("note", f"{count} rows: {note}") for note, count in data.notes.items())]


def _packed(config: TrainConfig) -> str:
    """Say how the base is quantized while it loads, if it is."""
    if config.quantize is None:
        return ""
    scales = " with quantized scales" if config.quantize in FOUR_BITS and config.double else ""
    return f", linears in {config.quantize}{scales}"


def _reached(job: Job) -> list[tuple[str, str]]:
    """Say which experts are adapted, or why not, what share of the base no target reaches, and what other
    programs would not load.
    """
    if not job.method.keeps_base:
        return []
    found = summary(job.model)
    rows = [("experts", found.experts)] if found.experts else []
    rows += [("left out", line) for line in found.experts_skipped]
    rows += [("not reached", str(found.unreached))] if found.unreached else []
    return [*rows, *(("note", text) for text in dict.fromkeys(found.notes))]


def _fused(job: Job) -> list[tuple[str, str]]:
    """List the fused blocks, and those that are not fused and slower for it; see `layers.fused`."""
    if not job.method.keeps_base or job.compiled:
        return []
    rows = report(job.model)
    fused = [f"{row.modules} {row.kind}" for row in rows if row.why_not is None]
    slower = [
        str(row) for row in rows if row.why_not is not None and (row.kind != ATTENTION or job.dtype.value.itemsize == 2)
    ]
    return [("fused", ", ".join(fused) or "nothing"), *(("note", line) for line in slower)]


def _why(device: Any) -> str:
    choice = choose_device()
    return choice.reason if choice.value.type == device.type else "accelerate's configuration"


def threads_of(device: Any) -> str:
    """Describe a device for the start panel: the CPU's threads, or the GPU's name."""
    import torch

    return (
        f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
        if device.type == "cpu"
        else torch.cuda.get_device_name()
        if device.type == "cuda"
        else device.type
    )


def _memory() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    return f"{peak_memory() / 2**30:.1f} GiB"


def dtype_name(dtype: Any) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _figure(name: str, value: float | None) -> str:
    """Format a metric: losses and shares with four decimals, others with two."""
    shown = (
        "beyond floating point" if value is None else f"{value:.4f}" if name == "loss" or value < 1 else f"{value:.2f}"
    )
    return f"{name.replace('_', ' ')} {shown}"


def _short_number(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _short(text: str, most: int = 110) -> str:
    one = " ".join(text.split())
    return one if len(one) <= most else one[: most - 1] + "…"
