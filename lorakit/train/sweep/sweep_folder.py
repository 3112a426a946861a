"""A sweep's folder: what was asked (`sweep.yaml`), a run folder for each run, and where all of them last saved
together.

    OUT/sweep.yaml            every setting, lists where they are swept
        position.json         the step of each run at the last save of all, and why runs failed
        runs/NAME/            a run's folder, as lorakit train makes it
        leaderboard.json      the runs, best first; plot.png beside it
        adapter/              the winner's

All runs save at the same moments. A kill may come when some have saved and others not; `position.json`, written when
all have, tells which checkpoints to go on from, so that the same rows share micro-batches as in a sweep that was not
killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...errors import TrainError
from ...io.atomic import write_text
from .. import resume
from ..run_folder import FREE, TEMPORARY, filled
from .sweep_config import Sweep

if TYPE_CHECKING:
    from ..run import Run
    from ..setup import Job


class SweepFolder:
    def __init__(self, path: Path):
        self.path = path
        self.settings = path / "sweep.yaml"
        self.position = path / "position.json"
        self.runs = path / "runs"
        self.leaderboard = path / "leaderboard.json"

    def open(self, sweep: Sweep) -> None:
        """Make the folder, or check that it is this sweep's. A sweep may come back with more values, not with other
        settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise TrainError(f"{self.path} is a file; give a folder (--out)")
        if not self.settings.exists():
            if self.path.is_dir() and not all(p.match(TEMPORARY) for p in self.path.iterdir()):
                raise TrainError(f"{self.path} is not empty and holds no sweep; give another folder (--out)")
        elif any(resume.found(run / "checkpoints") for run in self.runs.glob("*")):
            self._check_same(sweep)
        text = (
            "# Everything this sweep was started with. Written by lorakit; resume by the same command, or lorakit "
            "sweep --config this.\n"
        )
        write_text(self.settings, text + yaml.safe_dump(dict(sweep.settings), sort_keys=False, allow_unicode=True))

    def _check_same(self, sweep: Sweep) -> None:
        try:
            then = yaml.safe_load(self.settings.read_text(encoding="utf8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TrainError(f"{self.settings} cannot be read: {error}\n  give another folder (--out)") from error
        if not isinstance(then, dict):
            raise TrainError(f"{self.settings} holds no settings; give another folder (--out)")
        then = filled(then)
        lines = []
        for name in sorted(then.keys() | sweep.settings.keys()):
            before, now = then.get(name), sweep.settings.get(name)
            more = (
                name in sweep.swept
                and isinstance(before, list)
                and isinstance(now, list)
                and all(value in now for value in before)
            )
            if before != now and not more and (name in sweep.swept or name not in FREE):
                lines.append(f"  {name}: {before!r} then, {now!r} now")
        if lines:
            raise TrainError(
                f"{self.path} holds a sweep with other settings, so this one cannot go on from it:\n"
                + "\n".join(lines)
                + "\ngive another folder (--out), or the same settings to resume (a swept list may have become longer)"
            )

    def rewind(self, jobs: Iterable[Job]) -> dict[str, str]:
        """Drop the checkpoints of a save that not all runs came to make. The runs that failed, and why.

        A run that has since been trained on alone keeps what it has.
        """
        told = self._told()
        for job in jobs:
            folder = job.folder.checkpoints
            steps = resume.found(folder)
            if steps and self._together(folder / f"{resume.PREFIX}{steps[-1]}"):
                resume.drop_after(folder, told["steps"].get(job.adapter, 0))
        return told["failed"]

    def commit(self, runs: Iterable[Run]) -> None:
        """All runs have saved."""
        runs = list(runs)
        told = {
            "steps": {run.job.adapter: run.step for run in runs if run.failed is None},
            "failed": {run.job.adapter: run.failed for run in runs if run.failed is not None},
        }
        write_text(self.position, json.dumps(told, indent=2) + "\n")

    def _told(self) -> dict[str, Any]:
        if not self.position.exists():
            return {"steps": {}, "failed": {}}
        try:
            told = json.loads(self.position.read_text(encoding="utf8"))
            return {"steps": dict(told["steps"]), "failed": dict(told["failed"])}
        except (ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{self.position} cannot be read ({error})\n"
                "  remove it, and the sweep begins anew, or give another folder (--out)"
            ) from error

    @staticmethod
    def _together(at: Path) -> bool:
        return bool(json.loads((at / "state.json").read_text(encoding="utf8")).get("together"))
