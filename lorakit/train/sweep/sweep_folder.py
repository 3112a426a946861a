"""A sweep's folder: its settings, a run folder for each run, and the point at which all of them last saved.

    OUT/sweep.yaml            every setting, lists where they are swept
        position.json         each run's step at the last joint save, and the errors of failed runs
        runs/NAME/            a run's folder, as lorakit train makes it
        leaderboard.json      the runs, best first; plot.png beside it
        adapter/              the winner

All runs save at the same point. A sweep may be killed when only some have saved. `position.json`, written once all
have, says which checkpoints to resume from, so that the same rows share micro-batches as in an uninterrupted sweep.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...errors import AdapterError, TrainError
from ...io.atomic import write_text
from ...io.json_object import read_json
from .. import resume
from ..run_folder import FREE, is_ours, with_defaults
from .sweep_config import Sweep

if TYPE_CHECKING:
    from ..run import Run
    from ..setup import Job


class SweepFolder:
    """The paths inside a sweep's folder, and its position."""

    def __init__(self, path: Path):
        self.path = path
        self.settings = path / "sweep.yaml"
        self.position = path / "position.json"
        self.runs = path / "runs"
        self.leaderboard = path / "leaderboard.json"

    def open(self, sweep: Sweep) -> None:
        """Create the folder, or check that it belongs to this sweep, whose lists may have become longer.

        Raises TrainError, listing the settings that differ, if it belongs to another one.
        """
        if self.path.exists() and not self.path.is_dir():
            raise TrainError(f"{self.path} is a file\n  give a folder (--out)")
        if not self.settings.exists():
            if self.path.is_dir() and not all(map(is_ours, self.path.iterdir())):
                raise TrainError(f"{self.path} is not empty and contains no sweep\n  give another folder (--out)")
        elif any(resume.steps_in(run / "checkpoints") for run in self.runs.glob("*")):
            self._check_same(sweep)
        text = (
            "# All settings of this sweep. Written by lorakit; to resume, run the same command again, or lorakit "
            "sweep --config with this file.\n"
        )
        write_text(self.settings, text + yaml.safe_dump(dict(sweep.settings), sort_keys=False, allow_unicode=True))

    def _check_same(self, sweep: Sweep) -> None:
        try:
            then = yaml.safe_load(self.settings.read_text(encoding="utf8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TrainError(f"{self.settings} cannot be read: {error}\n  give another folder (--out)") from error
        if not isinstance(then, dict):
            raise TrainError(f"{self.settings} contains no settings\n  give another folder (--out)")
        then = with_defaults(then)
        lines = []
        for name in sorted(then.keys() | sweep.settings.keys()):
            before, now = then.get(name), sweep.settings.get(name)
            extended = (
                name in sweep.swept
                and isinstance(before, list)
                and isinstance(now, list)
                and all(value in now for value in before)
            )
            if before != now and not extended and (name in sweep.swept or name not in FREE):
                lines.append(f"  {name}: was {before!r}, is now {now!r}")
        if lines:
            raise TrainError(
                f"{self.path} contains a sweep with other settings, so it cannot be resumed with these:\n"
                + "\n".join(lines)
                + "\n  give another folder (--out), or the same settings to resume (a swept list may be longer)"
            )

    def rewind(self, jobs: Iterable[Job]) -> dict[str, str]:
        """Delete the checkpoints of a save that not all runs completed. Returns the failed runs' errors by name.

        A run that `lorakit train` has resumed alone since keeps its checkpoints.
        """
        position = self._read_position()
        for job in jobs:
            folder = job.folder.checkpoints
            steps = resume.steps_in(folder)
            if steps and self._together(folder / f"{resume.PREFIX}{steps[-1]}"):
                resume.drop_after(folder, position["steps"].get(job.adapter, 0))
        return position["failed"]

    def commit(self, runs: Iterable[Run]) -> None:
        """Record that all runs have saved."""
        runs = list(runs)
        position = {
            "steps": {run.job.adapter: run.step for run in runs if run.failed is None},
            "failed": {run.job.adapter: run.failed for run in runs if run.failed is not None},
        }
        write_text(self.position, json.dumps(position, indent=2) + "\n")

    def _read_position(self) -> dict[str, Any]:
        if not self.position.exists():
            return {"steps": {}, "failed": {}}
        try:
            position = json.loads(self.position.read_text(encoding="utf8"))
            return {"steps": dict(position["steps"]), "failed": dict(position["failed"])}
        except (ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{self.position} cannot be read ({error})\n"
                "  delete it to start the sweep over, or give another folder (--out)"
            ) from error

    @staticmethod
    def _together(at: Path) -> bool:
        """Whether a checkpoint was written by a sweep, together with those of the other runs; a damaged one counts."""
        try:
            return bool(read_json(at / "state.json").get("together"))
        except AdapterError:
            return True
