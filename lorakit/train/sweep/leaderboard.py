"""Rank a sweep's runs by held-out loss, or by the final training loss if no rows were held out.

Losses can only be compared on the same rows. Runs with different held-out rows (other data, another share, another
template) are ranked in separate groups, each with its own winner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...analysis.tables import Table
from ...data.dataset import fingerprint
from ..setup import DATA_SETTINGS
from .sweep_config import names, short

if TYPE_CHECKING:
    from ..run import Run
    from .sweep_config import Sweep

# The final training loss is the mean over the last tenth of the steps, since the loss of single batches is noisy.
LAST_SHARE = 10


@dataclass(frozen=True)
class Entry:
    """One run. `group`: the runs it is ranked among, '' if all runs are in one group."""

    name: str
    group: str
    settings: Mapping[str, Any]  # the swept settings
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
    on_fixed_noise: bool = False  # whether `loss` is that of training rows on fixed noise, after the last step
    place: int | None = None

    @property
    def score(self) -> float | None:
        """The loss it is ranked by; None if it failed."""
        return (
            None
            if self.failed is not None or self.adapter is None
            else self.loss
            if self.held_out_loss is None
            else self.held_out_loss
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)


def entries(sweep: Sweep, runs: Sequence[Run]) -> list[Entry]:
    """Rank all runs: group by group, best first, failed ones last."""
    groups = _groups(sweep, runs)
    unranked = [_entry(sweep, run, group) for run, group in zip(runs, groups, strict=True)]
    ranked = []
    for group in dict.fromkeys(groups):
        members = sorted(
            (e for e in unranked if e.group == group), key=lambda e: math.inf if e.score is None else e.score
        )
        ranked += [
            replace(entry, place=i) if entry.score is not None else entry for i, entry in enumerate(members, start=1)
        ]
    return ranked


def winners(ranked: Iterable[Entry]) -> dict[str, Entry]:
    """Return the best run of each group, except groups in which all failed."""
    return {entry.group: entry for entry in ranked if entry.place == 1}


def _entry(sweep: Sweep, run: Run, group: str) -> Entry:
    result, rows = run.result(), run.job.folder.rows()
    losses = [row["loss"] for row in rows if "loss" in row]
    fixed = [row["fixed_loss"] for row in rows if "fixed_loss" in row and row["step"] == result.step]
    curve = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    return Entry(
        run.job.adapter,
        group,
        sweep.values_of(run.job.adapter),
        result.best_loss,
        result.best_step,
        fixed[-1] if fixed else fmean(losses[-max(1, len(losses) // LAST_SHARE) :]) if losses else None,
        result.step,
        result.steps,
        result.stopped,
        run.failed,
        run.job.rate.value,
        sum(p.numel() for p in run.parameters.values()),
        round(result.seconds, 3),
        str(result.adapter) if result.adapter else None,
        curve,
        bool(fixed),
    )


def _groups(sweep: Sweep, runs: Sequence[Run]) -> list[str]:
    """Name each run's group, after the swept settings that determine its rows."""
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
    """Say what the runs were ranked by, to follow the word "by"."""
    held = [entry.held_out_loss is not None for entry in ranked if entry.score is not None]
    if not held:
        return "nothing yet, as no run is finished"
    training = "the training loss of the last tenth of the steps (no rows were held out)"
    if all(entry.on_fixed_noise for entry in ranked if entry.score is not None):
        training = "the loss of training rows on fixed noise (none were held out)"
    return "held-out loss" if all(held) else training if not any(held) else f"held-out loss, or {training}"


def table(ranked: Sequence[Entry], swept: Sequence[str], title: str = "") -> Table:
    """Build the leaderboard. `swept`: the settings that get a column."""
    grouped = len({entry.group for entry in ranked}) > 1
    noted = any(entry.stopped for entry in ranked)
    heads = ["", *(setting.replace("_", "\n") for setting in swept), *(["ranked\nwithin"] * grouped)]
    heads += ["held-out\nloss", "at\nstep", "training\nloss", "trainable", *[""] * noted]
    rows = []
    for entry in ranked:
        notes = {"early": f"stopped early at {entry.step}", "failed": f"failed at step {entry.step + 1}", None: ""}
        cells = [str(entry.place or "-"), *(_shown(setting, entry) for setting in swept), *([entry.group] * grouped)]
        cells += [_loss(entry.held_out_loss), str(entry.best_step or ""), _loss(entry.loss), f"{entry.trainable:,}"]
        rows.append(cells + [notes.get(entry.stopped, f"stopped by {entry.stopped} at {entry.step}")] * noted)
    return Table(title, heads, rows)


def _shown(setting: str, entry: Entry) -> str:
    if setting == "learning_rate":  # the resolved value for 'auto'
        return f"{entry.learning_rate:g}" + (" (auto)" if entry.settings[setting] == "auto" else "")
    return shown(entry.settings[setting])


def shown(value: Any) -> str:
    """Format a swept setting's value for a table."""
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
