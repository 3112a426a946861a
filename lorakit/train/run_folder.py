"""A run's folder: its config (`config.yaml`), a hash of its rows (`rows.sha256`), its metrics (`metrics.jsonl`),
checkpoints, samples and result.

A run started on its own folder resumes; with other settings it is refused, and the error lists the differences.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, TrainError, listing
from ..io.atomic import replacing, write_errors, write_text
from ..io.lock import locked
from ..io.staging import resolved
from .config import TrainConfig, home
from .longer import LENGTH, why_not
from .resume import newest_state, steps_in

# Settings that do not affect the result, so that they may differ when a run resumes.
FREE = {name for cls in TrainConfig.__mro__ for name in cls.__dict__.get("free", ())}
# The rows of metrics.jsonl that are evaluations have these before a metric's name: of held-out rows, or of training
# rows on fixed noise.
HELD_OUT, FIXED = "held_out_", "fixed_"
TEMPORARY = ".*.tmp"  # how `io.atomic.replacing` names a file while it is written
BEFORE = ("prior", "cache")  # folders that a task may fill before the run begins
_SAMPLES = re.compile(r"step-(\d+)(\.\w+)?")
LOCK = ".lorakit.lock"  # held by the process that is writing the folder


def is_ours(path: Path) -> bool:
    """Whether a file may be in a folder that a process has only just begun to use as a run's or a sweep's."""
    return path.name in (LOCK, *BEFORE) or path.match(TEMPORARY)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make a run's or a sweep's folder and hold its lock. Raises TrainError if it is a file, WriteError if another
    process is writing it or it cannot be written.
    """
    path = resolved(path)
    if path.exists() and not path.is_dir():
        raise TrainError(f"{path} is a file\n  give a folder (--out)")
    made = not path.exists()
    try:
        with contextlib.ExitStack() as stack:
            with write_errors(path):
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path / LOCK, str(path), "give another folder (--out)"))
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty: the run has begun
                path.rmdir()


class RunFolder:
    """The paths inside a run's folder, and its metrics."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.rows_hash = self.path / "rows.sha256"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.report = self.path / "report.html"

    def open(self, config: TrainConfig, rows_hash: str, steps: int | None = None) -> None:
        """Create the folder, or check that it belongs to this run. `steps`: the run's total, if it may grow.

        Raises TrainError, listing the settings that differ, if it belongs to another run. A run without a checkpoint
        has nothing to resume, so it starts over with any settings.
        """
        self.check_free()
        if not self.rows_hash.exists():
            if self.config.exists() and (self.metrics.exists() or steps_in(self.checkpoints)):
                raise TrainError(
                    f"{self.rows_hash} is missing: it says which rows this run is trained on\n"
                    f"  the SHA-256 of the rows given now is {rows_hash}\n"
                    "  if they are the same, write that into the file; otherwise give another folder (--out)"
                )
            self._check_empty()
        else:
            # Delete what interrupted writes left behind; no file of a run has such a name.
            for leftover in self.path.rglob(TEMPORARY):
                leftover.unlink(missing_ok=True)
            if steps_in(self.checkpoints):
                if not self._check_same(config.model_dump(), rows_hash, steps):
                    self._write_config(config)  # longer than before
                return
        # This file first: it marks the folder as a run's, even if the run is killed before it writes anything else.
        write_text(self.rows_hash, rows_hash + "\n")
        self._write_config(config)

    def check_free(self) -> None:
        """Raise TrainError if the folder is in use for something else than a run. Nothing is written."""
        if self.path.exists() and not self.path.is_dir():
            raise TrainError(f"{self.path} is a file\n  give a folder (--out)")
        if not self.rows_hash.exists() and not self.config.exists():
            self._check_empty()

    def _check_empty(self) -> None:
        if self.path.is_dir() and not all(map(is_ours, self.path.iterdir())):
            raise TrainError(f"{self.path} is not empty and contains no run\n  give another folder (--out)")

    def _write_config(self, config: TrainConfig) -> None:
        text = (
            "# All settings of this run, 'auto' included. Written by lorakit; run the same command again to resume.\n"
        )
        write_text(self.config, text + yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))

    def _check_same(self, now: dict[str, Any], rows_now: str, steps: int | None) -> bool:
        """Return whether the settings (`now`) are those the run was started with; False if it is only made longer.

        Raises TrainError if they or the rows' hash differ otherwise.
        """
        rows_then = self.rows_hash.read_bytes().decode("utf8", "replace").strip()
        if re.fullmatch("[0-9a-f]{64}", rows_then) is None:
            raise TrainError(
                f"{self.rows_hash} is damaged: expected the SHA-256 of the run's rows\n"
                f"  if the rows given now are the same, write theirs into it: {rows_now}\n"
                "  otherwise give another folder (--out)"
            )
        try:
            then = yaml.safe_load(self.config.read_text(encoding="utf8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TrainError(f"{self.config} cannot be read: {error}\n  give another folder (--out)") from error
        if not isinstance(then, dict):
            raise TrainError(f"{self.config} contains no settings\n  give another folder (--out)")
        then = with_defaults(then)
        changed = [k for k in sorted(now.keys() | then.keys()) if k not in FREE and then.get(k) != now.get(k)]
        lines = [f"  {k}: was {then.get(k)!r}, is now {now.get(k)!r}" for k in changed]
        if rows_then != rows_now:
            lines.append(f"  the tokenized rows: SHA-256 was {rows_then[:12]}, is now {rows_now[:12]}")
        if changed and steps is not None and LENGTH.issuperset(changed) and rows_then == rows_now:
            reason = why_not(newest_state(self.checkpoints), then["patience"], now["patience"], steps)
            if reason is None:
                return False
            lines.append(f"  {reason}")
        if lines:
            raise TrainError(
                f"{self.path} contains a run with other settings, so it cannot be resumed with these:\n"
                + "\n".join(lines)
                + "\n  give another folder (--out), or the same settings to resume"
            )
        return True

    def earlier(self) -> dict[str, Any]:
        """Return the settings of the run to resume; empty if there is none."""
        if not steps_in(self.checkpoints):
            return {}
        try:
            then = yaml.safe_load(self.config.read_text(encoding="utf8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}  # `open` will raise the error
        return then if isinstance(then, dict) else {}

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl. Raises WriteError if it cannot be written."""
        with write_errors(self.metrics), self.metrics.open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, except lines that a crash cut off."""
        return [row for _, row in self._lines() if row is not None]

    def _lines(self) -> list[tuple[int, dict[str, Any] | None]]:
        """Read metrics.jsonl: (line number, row), or None where the line is damaged."""
        if not self.metrics.exists():
            return []
        lines = []
        for number, line in enumerate(self.metrics.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            lines.append((number, row if isinstance(row, dict) and isinstance(row.get("step"), int) else None))
        return lines

    def rewind(self, step: int) -> list[str]:
        """Delete the metrics and samples after `step`, where the run resumes. Returns notes on what was lost before."""
        lines = self._lines()
        kept = [row for _, row in lines if row is not None and row["step"] <= step]
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf8")
        for at, sample in _numbered(self.samples):
            if at > step:
                shutil.rmtree(sample) if sample.is_dir() else sample.unlink()
        missing = sorted(set(range(1, step + 1)) - {row["step"] for row in kept if "loss" in row})
        damaged = [str(number) for number, row in lines if row is None]
        if not missing and damaged == [str(len(lines))]:
            damaged = []  # the run was killed while it wrote the last line, of a step that is taken again
        notes = []
        if damaged:
            notes.append(f"{self.metrics}: line {listing(damaged)} was damaged and is left out")
        if missing:
            notes.append(f"{self.metrics} has no row of step {listing(map(str, missing))}; training is not affected")
        return notes

    def sampled(self) -> list[tuple[int, Path]]:
        """List the sample files as (step, path), in order."""
        return [(step, path) for step, path in _numbered(self.samples) if path.is_file()]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """List the files and folders of samples, `step-N` and `step-N.<suffix>`, as (N, path), in order."""
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted((int(found[1]), path) for path in paths if (found := _SAMPLES.fullmatch(path.name)))


def evaluated(row: Mapping[str, Any]) -> str | None:
    """Return which evaluation a row of metrics.jsonl is of: `HELD_OUT`, `FIXED`, or None for a training step."""
    return next((prefix for prefix in (HELD_OUT, FIXED) if f"{prefix}loss" in row), None)


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Bring an earlier run's settings up to date: add the defaults of new settings, and normalize old values.

    So a run that was started before a setting existed can still be resumed.
    """
    filled = {
        name: field.get_default(call_default_factory=True) for name, field in TrainConfig.model_fields.items()
    } | dict(settings)
    for name in settings.keys() & TrainConfig.model_fields.keys():
        with contextlib.suppress(ConfigError):  # a sweep's list, or a value that is no longer valid: keep it
            filled[name] = getattr(TrainConfig(**{"data": "-", **home(name), name: settings[name]}), name)
    return filled
