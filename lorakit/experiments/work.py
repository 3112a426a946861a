"""A table's folder: what was measured so far, so that a killed table continues where it stopped.

OUT/NAME/cells.json     the budget, and each finished part with a hash of its settings and the CPU seconds it took
    runs/               run folders, as `lorakit train` and `sweep` write them
"""

from __future__ import annotations

import hashlib
import json
import os
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

    def cell(self, key: str, compute: Callable[[], Value], settings: Any) -> Value:
        """Return the stored value of a part; or compute and store it, also where it was stored with other settings.

        `settings`: plain data, all that the value depends on beside the code: a part is kept for these alone. Paths of
        files stand for their contents. The value must be plain data.
        """
        own, stored = fingerprint(settings), self._cells.get(key)
        if stored is None or stored.get("settings") != own:
            if stored is not None:
                self.say(f"  {key}: stored with other settings, measured again")
            began = time.process_time()
            value = compute()
            seconds = time.process_time() - began
            self._cells[key] = {"value": value, "settings": own, "seconds": round(seconds, 2)}
            content = {"settings": self.settings, "cells": self._cells}
            write_text(self.folder / CELLS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            self.say(f"  {key}: {seconds:.0f} CPU s")
        return self._cells[key]["value"]

    def seconds_of(self, key: str) -> float:
        """CPU seconds that a finished part took."""
        return float(self._cells[key]["seconds"])


def fingerprint(settings: Any) -> str:
    """Hash plain data. A path of a file that exists counts as its content, so that a moved folder has the same hash."""

    def content(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): content(own) for name, own in value.items()}
        if isinstance(value, list | tuple):
            return [content(own) for own in value]
        if isinstance(value, str | Path) and os.sep in str(value) and Path(value).is_file():
            return hashlib.sha256(Path(value).read_bytes()).hexdigest()
        return value

    text = json.dumps(content(settings), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf8")).hexdigest()[:16]


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
