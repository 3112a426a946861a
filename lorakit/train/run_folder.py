"""A run's folder: what was asked (`config.yaml`), what was measured (`metrics.jsonl`), checkpoints, samples, the result.

A run started on its own folder goes on; with another config it is refused, and the difference shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..errors import TrainError
from ..formats.files import replacing, write_text
from .config import TrainConfig

# Settings that do not change what is computed, so that a run may go on with others.
FREE = {"out", "track", "keep", "threads", "save_every", "sample_prompts", "sample_tokens"}


class RunFolder:
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.report = self.path / "report.html"

    def open(self, config: TrainConfig, data_hash: str) -> None:
        """Make the folder, or check that it is this run's. TrainError with the differing settings if it is another's."""
        now = config.model_dump() | {"data_hash": data_hash}
        if self.config.exists():
            then = yaml.safe_load(self.config.read_text(encoding="utf8"))
            changed = [k for k in sorted(now.keys() | then.keys()) if k not in FREE and then.get(k) != now.get(k)]
            if changed:
                lines = "\n".join(f"  {k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in changed)
                raise TrainError(
                    f"{self.path} holds a run with other settings, so this one cannot go on from it:\n{lines}\n"
                    "give another folder (--out), or the same settings to resume"
                )
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise TrainError(f"{self.path} is not empty and holds no run (no config.yaml); give another folder (--out)")
        self.path.mkdir(parents=True, exist_ok=True)
        text = "# Everything this run was started with, 'auto' included. Written by lorakit; resume by the same command.\n"
        write_text(self.config, text + yaml.safe_dump(now, sort_keys=False, allow_unicode=True))

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def rewind(self, step: int) -> None:
        """Drop what was logged after a step, before the run is taken up there again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf8")
