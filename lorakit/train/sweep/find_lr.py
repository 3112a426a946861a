"""The learning rate for a run, by trial: a short joint run of a few rates around the one `auto` would pick; the best is
taken.

Each rate runs the full shape of the schedule (warm-up, then down to zero) over its short number of steps: what is
looked for is the peak of such a schedule, and a rate that never falls would make the larger ones look worse than they
end. A short run's best rate tends to be higher than a long one's (its steps are few, so each has to go further).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...config import Choice
from ...errors import TrainError
from ...io.atomic import write_text
from ..config import TrainConfig
from ..interrupt import listening
from ..loop import Loop
from ..run import Run
from ..run_folder import RunFolder
from ..setup import set_up_together
from . import leaderboard
from .leaderboard import Entry
from .sweep_config import Sweep
from .sweep_progress import SweepProgress

if TYPE_CHECKING:
    from rich.table import Table

    from ..progress import Progress

FACTORS = (0.25, 0.5, 1, 2, 4, 8)  # of the rate that `auto` picks for the whole run
STEPS, SHARE = 40, 10  # so many, or a tenth of the run if that is fewer,
LEAST = 10  # but no fewer than these: warm-up and fall need some steps
HELD_OUT = 256  # rows at most; telling rates apart needs no more
FILE = "find_lr.json"


@dataclass(frozen=True)
class Found:
    """The rate, and what was tried (none if an earlier start of the run had found it)."""

    rate: float
    tried: list[Entry]

    def keep(self, folder: RunFolder) -> None:
        """Written into the run's folder, so that a resumed run does not look again."""
        if self.tried:
            rows = [
                {"learning_rate": e.learning_rate, "held_out_loss": e.held_out_loss, "loss": e.loss, "failed": e.failed}
                for e in self.tried
            ]
            write_text(folder.path / FILE, json.dumps({"learning_rate": self.rate, "tried": rows}, indent=2) + "\n")


def find(config: TrainConfig, progress: Progress) -> Found:
    """The best of a few rates for this run, or what was found when it was first started."""
    kept = RunFolder(config.out).path / FILE
    if kept.exists():
        return Found(float(json.loads(kept.read_text(encoding="utf8"))["learning_rate"]), [])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError(
            "find_lr tries rates in one process\n"
            "  start the run in one process first, and stop it once it trains; several can go on with it"
        )
    with tempfile.TemporaryDirectory(prefix="lorakit-find-lr-") as folder:
        tried = _try(config, Path(folder), progress)
    best = next((entry for entry in tried if entry.place == 1), None)
    if best is None:
        raise TrainError(
            f"no learning rate of {[e.learning_rate for e in tried]} can be trained with:\n"
            f"{tried[0].failed}\n"
            "  give a learning_rate"
        )
    if not progress.quiet:
        edge = best.learning_rate in (min(e.learning_rate for e in tried), max(e.learning_rate for e in tried))
        more = "; it is the last of those tried, so a better one may lie beyond" if edge else ""
        progress.console.print(_table(tried))
        progress.console.print(
            f"learning rate {best.learning_rate:g}, by {leaderboard.criterion(tried)}{more}",
            highlight=False,
            soft_wrap=True,
        )
    return Found(best.learning_rate, tried)


def _try(config: TrainConfig, folder: Path, progress: Progress) -> list[Entry]:
    """Short runs side by side, in a folder that is thrown away."""
    never = 1 << 30
    short = config.replace(
        find_lr=False, eval_every=never, save_every=never, patience=0, sample_tokens=0, track=[], compile=False
    )
    configs = {f"x{factor:g}": short.replace(out=str(folder / f"x{factor:g}")) for factor in FACTORS}
    jobs = set_up_together(configs)
    for job, factor in zip(jobs, FACTORS, strict=True):
        job.rate = Choice(float(f"{job.rate.value * factor:.2g}"), f"{factor:g} times {job.rate.reason}")
        job.steps = min(job.steps, STEPS, max(LEAST, job.steps // SHARE))
        job.held_out = job.held_out[:HELD_OUT]
    shown = SweepProgress(progress.console, progress.quiet, title="lorakit train --find-lr")
    runs = [Run(job, shown.lane(job.adapter)) for job in jobs]
    with contextlib.closing(Loop(runs, ended=shown.ended)) as loop, contextlib.closing(shown), listening() as interrupt:
        shown.start(runs, "none: these runs are thrown away")
        loop.go(interrupt)
    if interrupt.signal and not all(run.ended for run in runs):
        raise TrainError(
            f"stopped by {interrupt.signal} while looking for a learning rate; nothing was kept: start the run again"
        )
    return leaderboard.entries(Sweep({"out": str(folder)}, (), configs), runs)


def _table(tried: Sequence[Entry]) -> Table:
    from rich.table import Table as RichTable

    made = RichTable("learning rate", "held-out loss", "training loss")
    for entry in sorted(tried, key=lambda e: e.learning_rate):
        cells = [
            f"{entry.learning_rate:g}",
            *("" if x is None else f"{x:.4f}" for x in (entry.held_out_loss, entry.loss)),
        ]
        made.add_row(*cells[:-1], "failed" if entry.failed else cells[-1], style="bold" if entry.place == 1 else None)
    return made
