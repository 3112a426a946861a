"""A table's folder: what was measured so far, so that a killed table continues where it stopped.

OUT/NAME/cells.json     the settings, and each finished part with the CPU seconds it took
    runs/               run folders, as `lorakit train` and `sweep` write them
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..io.atomic import write_text
from .suite import Budget

Value = TypeVar("Value")
CELLS = "cells.json"


class Work:
    """The folder in which one table is measured. `file`: the user's data, for tables that need some."""

    def __init__(self, folder: Path, budget: Budget, say: Callable[[str], None] = print, file: Path | None = None):
        """Raises ConfigError if the folder holds the table with other settings, or is damaged."""
        self.folder, self.budget, self.say, self.file = folder, budget, say, file
        self.settings: dict[str, Any] = {k: v for k, v in asdict(budget).items() if v is not None} | (
            {"file": str(file)} if file else {}
        )
        self._cells = _read(folder / CELLS, self.settings)

    @property
    def runs(self) -> Path:
        """Where training runs are written."""
        return self.folder / "runs"

    @property
    def seconds(self) -> float:
        """CPU seconds of all finished parts, over all starts."""
        return sum(cell["seconds"] for cell in self._cells.values())

    def cell(self, key: str, compute: Callable[[], Value]) -> Value:
        """Return the stored value of a part, or compute and store it. The value must be plain data."""
        if key not in self._cells:
            began = time.process_time()
            value = compute()
            seconds = time.process_time() - began
            self._cells[key] = {"value": value, "seconds": round(seconds, 2)}
            content = {"settings": self.settings, "cells": self._cells}
            write_text(self.folder / CELLS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            self.say(f"  {key}: {seconds:.0f} CPU s")
        return self._cells[key]["value"]

    def seconds_of(self, key: str) -> float:
        """CPU seconds that a finished part took."""
        return float(self._cells[key]["seconds"])


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        stored, cells = dict(content["settings"]), dict(content["cells"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error})\n  start this table over: --force") from error
    if stored != settings:
        lines = [
            f"  {name}: {stored.get(name)} there, {settings.get(name)} now"
            for name in sorted({*stored, *settings})
            if stored.get(name) != settings.get(name)
        ]
        raise ConfigError(
            f"{path.parent} holds this table with another budget:\n" + "\n".join(lines) + "\n"
            "  give the same to continue it, another folder (--out), or --force to start this table over"
        )
    return cells


def start_over(folder: Path) -> None:
    """Delete a table's folder. Raises ConfigError if it is not one."""
    if folder.exists() and not (folder / CELLS).exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no table\n  give another folder (--out)")
    if folder.exists():
        shutil.rmtree(folder)
