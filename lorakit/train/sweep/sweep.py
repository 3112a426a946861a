"""A sweep: many adapters trained together on one base, each as it would be alone; a leaderboard; the winner.

Each run has its own data order, optimizer, schedule, clipping and early stop, and its own folder, which `lorakit train`
can go on with. What they share is the pass through the base.
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
from ..interrupt import listening
from ..loop import Loop
from ..run import Run
from ..setup import set_up_together
from . import leaderboard, sweep_plot
from .leaderboard import Entry
from .sweep_config import Sweep
from .sweep_folder import SweepFolder
from .sweep_progress import SweepProgress


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended. `winners`: the best run's adapter folder by group ('' if all runs were compared); empty if
    interrupted.
    """

    entries: list[Entry]
    criterion: str
    winners: dict[str, Path]
    plots: list[Path]
    leaderboard: Path
    seconds: float
    stopped: str | None  # the signal's name

    def to_dict(self) -> dict[str, Any]:
        return {
            "stopped": self.stopped,
            "criterion": self.criterion,
            "winners": {group: str(path) for group, path in self.winners.items()},
            "leaderboard": str(self.leaderboard),
            "plots": list(map(str, self.plots)),
            "seconds": round(self.seconds, 3),
            "runs": [entry.to_dict() for entry in self.entries],
        }


def sweep(plan: Sweep, progress: SweepProgress | None = None) -> Outcome:
    """Train all runs of a sweep. Started again on its folder it goes on where it stopped;
    finished runs stay finished.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError(
            "a sweep runs in one process; several (accelerate launch, torchrun) train one adapter\n"
            "  start lorakit sweep by itself"
        )
    began = time.perf_counter()
    progress = progress or SweepProgress()
    folder = SweepFolder(plan.out)
    folder.open(plan)
    jobs = set_up_together(plan.runs)
    jobs[0].task.check_together(jobs[0].model)
    failed = folder.rewind(jobs)
    runs = [Run(job, progress.lane(job.adapter)) for job in jobs]
    for run in runs:
        run.failed = failed.get(run.job.adapter)
    loop = Loop(runs, saved=lambda: folder.commit(runs), ended=progress.ended)
    with contextlib.closing(loop), contextlib.closing(progress), listening() as interrupt:
        progress.start(runs, str(folder.path))
        results = loop.go(interrupt)
    stopped = next((r.stopped for r in results if r.stopped not in (None, "early", "failed")), None)
    if not stopped:
        folder.commit(runs)  # a run that failed last has saved nothing since
    ranked = leaderboard.entries(plan, runs)
    won = {} if stopped else _keep_winners(leaderboard.winners(ranked), folder.path)
    outcome = Outcome(
        ranked,
        leaderboard.criterion(ranked),
        won,
        [] if stopped else _plots(ranked, plan, folder.path),
        folder.leaderboard,
        time.perf_counter() - began,
        stopped,
    )
    write_text(folder.leaderboard, json.dumps(outcome.to_dict(), indent=2) + "\n")
    return outcome


def _keep_winners(best: Mapping[str, Entry], out: Path) -> dict[str, Path]:
    """`adapter/`, or `adapter-GROUP/` for each of several groups."""
    kept = {}
    for group, entry in best.items():
        assert entry.adapter is not None
        kept[group] = Adapter.load(entry.adapter).save(out / (f"adapter-{group}" if group else "adapter"))
    return kept


def _plots(ranked: list[Entry], plan: Sweep, out: Path) -> list[Path]:
    made = []
    for group in dict.fromkeys(entry.group for entry in ranked):
        mine = [entry for entry in ranked if entry.group == group]
        path = out / (f"plot-{group}.png" if group else "plot.png")
        if sweep_plot.plot(
            mine,
            plan.swept,
            path,
            f"{out.name}: {len(mine)} runs, by {leaderboard.criterion(mine)}" + f", {group}" * bool(group),
        ):
            made.append(path)
    return made
