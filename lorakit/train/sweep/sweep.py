"""Train many adapters together on one base, each as it would be trained alone; write a leaderboard; keep the winner.

Each run has its own data order, optimizer, schedule, clipping, early stopping and folder, in which `lorakit train` can
resume it. The runs share only the passes through the base.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapter.adapter import Adapter
from ...errors import TrainError
from ...io.atomic import write_text
from ..interrupt import catching_signals
from ..loop import Loop
from ..run import Run
from ..run_folder import locked_folder
from ..setup import set_up_together
from . import leaderboard, noise, sweep_plot
from .leaderboard import Entry
from .sweep_config import Sweep
from .sweep_folder import SweepFolder
from .sweep_progress import SweepProgress


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended. `over_seeds`: settings compared over seeds, if these were swept. `winners`: group -> folder
    of the best run's adapter ('' if there is one group); empty if the sweep was interrupted. `stopped`: the signal's
    name. `seconds`: of this start.
    """

    entries: list[Entry]
    over_seeds: list[noise.Settings]
    criterion: str
    winners: dict[str, Path]
    plots: list[Path]
    leaderboard: Path
    seconds: float
    stopped: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return {
            "stopped": self.stopped,
            "criterion": self.criterion,
            "winners": {group: str(path) for group, path in self.winners.items()},
            "leaderboard": str(self.leaderboard),
            "plots": list(map(str, self.plots)),
            "seconds": round(self.seconds, 3),
            "over_seeds": [each.to_dict() for each in self.over_seeds],
            "runs": [entry.to_dict() for entry in self.entries],
        }


def sweep(plan: Sweep, progress: SweepProgress | None = None) -> Outcome:
    """Train all runs of a sweep, or resume it in its folder. Finished runs are not trained again.

    Raises TrainError for several processes, a folder with another sweep, or a base whose rows cannot share a batch;
    WriteError if another process is at work in the folder.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError(
            "a sweep runs in one process; accelerate launch and torchrun are for training one adapter\n"
            "  start lorakit sweep without them"
        )
    with contextlib.ExitStack() as held:
        folder = SweepFolder(plan.out)
        held.enter_context(locked_folder(folder.path))
        folder.open(plan)
        return _train(plan, folder, progress or SweepProgress(), held)


def _train(plan: Sweep, folder: SweepFolder, progress: SweepProgress, held: contextlib.ExitStack) -> Outcome:
    began = time.perf_counter()
    jobs = set_up_together(plan.runs, held)
    jobs[0].task.check_together(jobs[0].model)
    failed = folder.rewind(jobs)
    runs = [Run(job, progress.display_of(job.adapter)) for job in jobs]
    for run in runs:
        run.failed = failed.get(run.job.adapter)
    loop = Loop(runs, saved=lambda: folder.commit(runs), ended=progress.ended)
    with contextlib.closing(loop), contextlib.closing(progress), catching_signals() as interrupt:
        progress.start(runs, str(folder.path))
        results = loop.go(interrupt)
    stopped = next((r.stopped for r in results if r.stopped not in (None, "early", "failed")), None)
    if not stopped:
        folder.commit(runs)  # a run that failed in the last step is not in position.json yet
    ranked = leaderboard.entries(plan, runs)
    winners = {} if stopped else _save_winners(leaderboard.winners(ranked), folder.path)
    outcome = Outcome(
        ranked,
        noise.over_seeds(ranked, plan.swept),
        leaderboard.criterion(ranked),
        winners,
        [] if stopped else _plots(ranked, plan, folder.path),
        folder.leaderboard,
        time.perf_counter() - began,
        stopped,
    )
    write_text(folder.leaderboard, json.dumps(outcome.to_dict(), indent=2) + "\n")
    return outcome


def _save_winners(best: Mapping[str, Entry], out: Path) -> dict[str, Path]:
    """Copy each winner to `adapter/`, or to `adapter-GROUP/` if there are several groups."""
    folders = {}
    for group, entry in best.items():
        assert entry.adapter is not None
        folders[group] = Adapter.load(entry.adapter).save(out / (f"adapter-{group}" if group else "adapter"))
    return folders


def _plots(ranked: list[Entry], plan: Sweep, out: Path) -> list[Path]:
    plots = []
    for group in dict.fromkeys(entry.group for entry in ranked):
        members = [entry for entry in ranked if entry.group == group]
        path = out / (f"plot-{group}.png" if group else "plot.png")
        if sweep_plot.plot(
            members,
            plan.swept,
            path,
            f"{out.name}: {len(members)} runs, by {leaderboard.criterion(members)}" + f", {group}" * bool(group),
        ):
            plots.append(path)
    return plots
