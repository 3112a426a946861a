"""Which run of a sweep came out best: by held-out loss where rows were held out, otherwise by the training loss at the
end.

Losses compare on the same rows only. Runs whose held-out rows differ (other data, another share, another template) are
ranked apart, each group with a winner of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...data.dataset import fingerprint
from ..setup import DATA_SETTINGS
from .sweep_config import names, short

if TYPE_CHECKING:
    from rich.table import Table

    from ..run import Run
    from .sweep_config import Sweep

# Single batches jump, so the training loss at the end is the mean of the last tenth of the steps.
LAST_SHARE = 10


@dataclass(frozen=True)
class Entry:
    """One run. `group`: what it is compared within, '' if all runs are compared."""

    name: str
    group: str
    settings: Mapping[str, Any]  # the swept ones
    held_out_loss: float | None
    best_step: int | None
    loss: float | None
    step: int
    steps: int
    stopped: str | None
    failed: str | None
    learning_rate: float
    trainable: int
    seconds: float
    adapter: str | None
    curve: list[tuple[int, float]]  # held-out loss by step
    place: int | None = None

    @property
    def score(self) -> float | None:
        """What it is ranked by; None if it failed."""
        return (
            None
            if self.failed is not None or self.adapter is None
            else self.loss
            if self.held_out_loss is None
            else self.held_out_loss
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def entries(sweep: Sweep, runs: Sequence[Run]) -> list[Entry]:
    """All runs, group by group, best first, failed ones last."""
    groups = _groups(sweep, runs)
    found = [_entry(sweep, run, group) for run, group in zip(runs, groups, strict=True)]
    ordered = []
    for group in dict.fromkeys(groups):
        mine = sorted((e for e in found if e.group == group), key=lambda e: math.inf if e.score is None else e.score)
        ordered += [
            replace(entry, place=i) if entry.score is not None else entry for i, entry in enumerate(mine, start=1)
        ]
    return ordered


def winners(ranked: Iterable[Entry]) -> dict[str, Entry]:
    """The best of each group that has one."""
    return {entry.group: entry for entry in ranked if entry.place == 1}


def _entry(sweep: Sweep, run: Run, group: str) -> Entry:
    result, rows = run.result(), run.job.folder.rows()
    losses = [row["loss"] for row in rows if "loss" in row]
    curve = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    return Entry(
        run.job.adapter,
        group,
        sweep.values_of(run.job.adapter),
        result.best_loss,
        result.best_step,
        fmean(losses[-max(1, len(losses) // LAST_SHARE) :]) if losses else None,
        result.step,
        result.steps,
        result.stopped,
        run.failed,
        run.job.rate.value,
        sum(p.numel() for p in run.parameters.values()),
        round(result.seconds, 3),
        str(result.adapter) if result.adapter else None,
        curve,
    )


def _groups(sweep: Sweep, runs: Sequence[Run]) -> list[str]:
    """A name for each run's group, from the swept settings that choose the rows."""
    keys = [fingerprint(run.job.held_out or run.job.train) for run in runs]
    if len(set(keys)) == 1:
        return [""] * len(runs)
    swept = [setting for setting in sweep.swept if setting in DATA_SETTINGS]
    first = {key: {s: getattr(runs[i].config, s) for s in swept} for i, key in reversed(list(enumerate(keys)))}
    order = list(dict.fromkeys(keys))
    if swept == ["data"]:
        labels = [short(first[key]["data"]) for key in order]
        labels = labels if len(set(labels)) == len(labels) else names(first[key] for key in order)
    else:
        labels = names(first[key] for key in order)
    return [dict(zip(order, labels, strict=True))[key] for key in keys]


def criterion(ranked: Sequence[Entry]) -> str:
    """What the runs were ranked by, in words that follow "by"."""
    held = [entry.held_out_loss is not None for entry in ranked if entry.score is not None]
    if not held:
        return "nothing yet, as no run came to its end"
    training = "the training loss of the last tenth of the steps (no rows were held out)"
    return "held-out loss" if all(held) else training if not any(held) else f"held-out loss, or {training}"


def table(ranked: Sequence[Entry], swept: Sequence[str], title: str = "") -> Table:
    """For a console. `swept`: the settings that get a column."""
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(title=title or None, title_justify="left")
    grouped = len({entry.group for entry in ranked}) > 1
    numbers = {
        s: all(isinstance(e.settings[s], int | float) and not isinstance(e.settings[s], bool) for e in ranked)
        for s in swept
    }
    made.add_column("", justify="right")
    for setting in swept:
        made.add_column(setting, justify="right" if numbers[setting] else "left", overflow="fold")
    noted = any(entry.stopped for entry in ranked)
    for column in (
        ["compared within"] * grouped + ["held-out loss", "at step", "training loss", "trainable"] + [""] * noted
    ):
        made.add_column(column, justify="left" if column in ("", "compared within") else "right")
    for entry in ranked:
        how = {"early": f"stopped early at {entry.step}", "failed": f"failed at step {entry.step + 1}", None: ""}
        cells = [str(entry.place or "-"), *(_shown(setting, entry) for setting in swept), *([entry.group] * grouped)]
        cells += [_loss(entry.held_out_loss), str(entry.best_step or ""), _loss(entry.loss), f"{entry.trainable:,}"]
        cells += [how.get(entry.stopped, f"stopped by {entry.stopped} at {entry.step}")] * noted
        made.add_row(*map(Text, cells), style="bold" if entry.place == 1 else None)
    return made


def _shown(setting: str, entry: Entry) -> str:
    value = entry.settings[setting]
    if setting == "learning_rate":  # 'auto' as what it came to be
        return f"{entry.learning_rate:g}" + (" (auto)" if value == "auto" else "")
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
