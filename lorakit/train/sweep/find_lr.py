"""Find a run's learning rate: train a few rates around the `auto` one in a short sweep, and take the best.

Each rate runs the full schedule (warm-up, then down to zero) over its few steps, since the result is to be the peak of
such a schedule; without the decay, large rates would look worse than they are. The best rate of a short run tends to be
higher than that of a long one, since each of its few steps has to go further.
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

from ...analysis.tables import Table
from ...config import Choice
from ...errors import StoppedError, TrainError
from ...io.atomic import write_text
from ..config import TrainConfig
from ..interrupt import catching_signals
from ..loop import Loop
from ..run import Run
from ..run_folder import RunFolder
from ..setup import set_up_together
from . import leaderboard
from .leaderboard import Entry
from .sweep_config import Sweep
from .sweep_progress import SweepProgress

if TYPE_CHECKING:
    from ..progress import Progress

FACTORS = (0.25, 0.5, 1, 2, 4, 8)  # times the rate that `auto` picks for the run
STEPS, SHARE = 40, 10  # steps per rate: 40, or a tenth of the run if that is less,
LEAST = 10  # but at least 10, as warm-up and decay need some steps
HELD_OUT = 256  # rows at most: enough to rank the rates
FILE = "find_lr.json"


@dataclass(frozen=True)
class Search:
    """The rate found, and the runs that were tried; none if the run found its rate at an earlier start."""

    rate: float
    tried: list[Entry]

    def keep(self, folder: RunFolder) -> None:
        """Write the result into the run's folder, so that a resumed run does not search again."""
        if self.tried:
            rows = [
                {"learning_rate": e.learning_rate, "held_out_loss": e.held_out_loss, "loss": e.loss, "failed": e.failed}
                for e in self.tried
            ]
            write_text(folder.path / FILE, json.dumps({"learning_rate": self.rate, "tried": rows}, indent=2) + "\n")


def find(config: TrainConfig, progress: Progress) -> Search:
    """Find the best of a few rates for this run, or return the rate found when it was first started.

    Raises TrainError with several processes or if every rate fails, and StoppedError if a signal stops the search.
    """
    earlier = RunFolder(config.out).path / FILE
    if earlier.exists():
        try:
            return Search(float(json.loads(earlier.read_bytes())["learning_rate"]), [])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{earlier} is damaged: it holds the learning rate that was found when the run began\n"
                "  put it back, or give another folder (--out)"
            ) from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError(
            "find_lr works in one process only\n"
            "  start the run in one process and stop it once it trains; several processes can then resume it"
        )
    with tempfile.TemporaryDirectory(prefix="lorakit-find-lr-") as folder:
        tried = _try(config, Path(folder), progress)
    best = next((entry for entry in tried if entry.place == 1), None)
    if best is None:
        raise TrainError(
            f"training failed with each of the learning rates {[e.learning_rate for e in tried]}:\n"
            f"{tried[0].failed}\n"
            "  give a learning_rate"
        )
    if not progress.quiet:
        edge = best.learning_rate in (min(e.learning_rate for e in tried), max(e.learning_rate for e in tried))
        more = "; it is at the edge of the range tried, so a better one may lie beyond" if edge else ""
        progress.console.print(_table(tried))
        progress.console.print(
            f"learning rate {best.learning_rate:g}, by {leaderboard.criterion(tried)}{more}",
            highlight=False,
            soft_wrap=True,
        )
    return Search(best.learning_rate, tried)


def _try(config: TrainConfig, folder: Path, progress: Progress) -> list[Entry]:
    """Train one short run per rate, in a temporary folder."""
    never = 1 << 30
    short = config.replace(
        find_lr=False,
        eval_every=never,
        save_every=never,
        patience=0,
        sample_tokens=0,
        sample_steps=0,
        track=[],
        compile=False,
        diverged="continue",
    )
    configs = {f"x{factor:g}": short.replace(out=str(folder / f"x{factor:g}")) for factor in FACTORS}
    jobs = set_up_together(configs)
    jobs[0].task.check_together(jobs[0].model)
    for job, factor in zip(jobs, FACTORS, strict=True):
        job.rate = Choice(float(f"{job.rate.value * factor:.2g}"), f"{factor:g} times {job.rate.reason}")
        job.steps = min(job.steps, STEPS, max(LEAST, job.steps // SHARE))
        job.held_out = job.held_out[:HELD_OUT]
    display = SweepProgress(progress.console, progress.quiet, title="lorakit train --find-lr", before=progress.before)
    runs = [Run(job, display.display_of(job.adapter)) for job in jobs]
    loop = Loop(runs, ended=display.ended)
    with contextlib.closing(loop), contextlib.closing(display), catching_signals() as interrupt:
        display.start(runs, "none: these runs are temporary")
        loop.go(interrupt)
    if interrupt.signal and not all(run.ended for run in runs):
        raise StoppedError(
            f"stopped by {interrupt.signal} during the search for a learning rate; nothing was saved\n"
            "  start the run again",
            interrupt.signal,
        )
    return leaderboard.entries(Sweep({"out": str(folder)}, (), configs, {name: {} for name in configs}), runs)


def _table(tried: Sequence[Entry]) -> Table:
    rows = [
        [
            f"{entry.learning_rate:g}",
            "" if entry.held_out_loss is None else f"{entry.held_out_loss:.4f}",
            "failed" if entry.failed else "" if entry.loss is None else f"{entry.loss:.4f}",
            "best" if entry.place == 1 else "",
        ]
        for entry in sorted(tried, key=lambda e: e.learning_rate)
    ]
    return Table("", ["learning rate", "held-out loss", "training loss", ""], rows)
