"""A run's folder: what was asked (`config.yaml`), of which rows (`rows.sha256`), what was measured (`metrics.jsonl`),
checkpoints, samples, the result.

A run started on its own folder goes on; with another config it is refused, and the difference shown.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, TrainError
from ..io.atomic import replacing, write_text
from .config import TrainConfig
from .resume import found

# Settings that do not change what is computed, so that a run may go on with others.
FREE = {name for cls in TrainConfig.__mro__ for name in cls.__dict__.get("free", ())}
TEMPORARY = ".*.tmp"  # what `io.atomic.replacing` names a file that is being written


class RunFolder:
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

    def open(self, config: TrainConfig, rows_hash: str) -> None:
        """Make the folder, or check that it is this run's. TrainError with the differing settings if it is another's.

        A run that failed before its first checkpoint has nothing to go on from, so it is begun anew with any settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise TrainError(f"{self.path} is a file; give a folder (--out)")
        if not self.rows_hash.exists():
            if self.path.is_dir() and not all(p.match(TEMPORARY) for p in self.path.iterdir()):
                raise TrainError(f"{self.path} is not empty and holds no run; give another folder (--out)")
        else:
            # What writes that were killed left behind; the run's own files never have such names.
            for leftover in self.path.rglob(TEMPORARY):
                leftover.unlink(missing_ok=True)
            if found(self.checkpoints):
                self._check_same(config.model_dump(), rows_hash)
                return
        # This file first, as it tells that the folder is ours: whenever the run is killed, the next one knows it again.
        write_text(self.rows_hash, rows_hash + "\n")
        text = (
            "# Everything this run was started with, 'auto' included. Written by lorakit; resume by the same command.\n"
        )
        write_text(self.config, text + yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))

    def _check_same(self, now: dict[str, Any], rows_now: str) -> None:
        rows_then = self.rows_hash.read_text(encoding="utf8").strip()
        try:
            then = yaml.safe_load(self.config.read_text(encoding="utf8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TrainError(f"{self.config} cannot be read: {error}\n  give another folder (--out)") from error
        if not isinstance(then, dict):
            raise TrainError(f"{self.config} holds no settings; give another folder (--out)")
        then = filled(then)
        changed = [k for k in sorted(now.keys() | then.keys()) if k not in FREE and then.get(k) != now.get(k)]
        lines = [f"  {k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in changed]
        if rows_then != rows_now:
            lines.append(
                f"  the rows, as token ids: other ones now (SHA-256 {rows_then[:12]} then, {rows_now[:12]} now)"
            )
        if lines:
            raise TrainError(
                f"{self.path} holds a run with other settings, so this one cannot go on from it:\n"
                + "\n".join(lines)
                + "\ngive another folder (--out), or the same settings to resume"
            )

    def begun_on(self) -> str | None:
        """The date that the run's chat template writes, if there is a run to resume and it keeps one."""
        if not found(self.checkpoints):
            return None
        try:
            then = yaml.safe_load(self.config.read_text(encoding="utf8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None  # `open` says what is wrong with it
        date = then.get("date") if isinstance(then, dict) else None
        return None if date is None else str(date)

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Drop what was logged and sampled after a step, before the run is taken up there again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf8")
        for at, sample in self.sampled():
            if at > step:
                sample.unlink()

    def sampled(self) -> list[tuple[int, Path]]:
        """The files of samples and their steps, in order."""
        files = self.samples.glob("step-*.json") if self.samples.is_dir() else []
        return sorted((int(file.stem.removeprefix("step-")), file) for file in files)


def filled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier run's settings as they are read today: those that came since have their defaults, values have their
    present spelling.
    """
    found = {
        name: field.get_default(call_default_factory=True) for name, field in TrainConfig.model_fields.items()
    } | dict(settings)
    for name in settings.keys() & TrainConfig.model_fields.keys():
        with contextlib.suppress(ConfigError):  # a value that is none any more, or a sweep's list: it stays as it is
            found[name] = getattr(TrainConfig(**{"data": "-", name: settings[name]}), name)
    return found
