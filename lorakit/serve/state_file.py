"""The adapters that were loaded over HTTP, on disk, so that a restarted server has the same.

    {"version": 1, "base": "...", "adapters": [{"name", "place", "pinned", "created"}, ...]}

Written atomically at each load and unload. A lock beside it keeps two servers from writing the same file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ConfigError
from ..io.atomic import write_errors, write_text
from ..io.json_object import read_json
from ..io.lock import locked
from .names import is_name

VERSION = 1


@dataclass(frozen=True)
class Loaded:
    """An adapter as it was loaded over HTTP. created: seconds since 1970."""

    name: str
    place: str
    pinned: bool
    created: int


class StateFile:
    """The file, locked from `open` to `close`."""

    def __init__(self, path: Path, base: str):
        """base: the base's name; the adapters of another base would not fit."""
        self.path, self.base = path, base
        self._locks = contextlib.ExitStack()

    def open(self) -> list[Loaded]:
        """Lock the file and return what it holds; nothing if it is not there yet.

        Raises ConfigError for a file that is broken or another base's, and WriteError if another server has it or
        nothing can be written there.
        """
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self.path.name}.lock")
            self._locks.enter_context(locked(lock, str(self.path), "give this server another one (--state)"))
        try:
            return self._read() if self.path.exists() else []
        except BaseException:
            self.close()
            raise

    def write(self, adapters: Sequence[Loaded]) -> None:
        """Replace what the file holds. Raises WriteError, with the file as it was."""
        values = {"version": VERSION, "base": self.base, "adapters": [asdict(one) for one in adapters]}
        write_text(self.path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Unlock the file."""
        self._locks.close()

    def _read(self) -> list[Loaded]:
        try:
            values = read_json(self.path)
        except AdapterError as error:
            raise self._broken(str(error)) from error
        if values.get("version") != VERSION:
            raise self._broken(f"{self.path} has version {values.get('version')!r}; expected {VERSION}")
        if values.get("base") != self.base:
            raise ConfigError(
                f"{self.path} has the adapters of the base {values.get('base')!r}, and this one is '{self.base}'\n"
                "  give each base its own state file (--state)"
            )
        adapters = values.get("adapters")
        if not isinstance(adapters, list):
            raise self._broken(f"{self.path}: 'adapters' is {type(adapters).__name__}; expected a list")
        return [self._one(value, at) for at, value in enumerate(adapters)]

    def _one(self, value: Any, at: int) -> Loaded:
        kinds = {"name": str, "place": str, "pinned": bool, "created": int}
        if not isinstance(value, dict) or any(type(value.get(name)) is not kind for name, kind in kinds.items()):
            raise self._broken(f"{self.path}: adapter {at} is {str(value)[:80]}; expected {', '.join(kinds)}")
        if not is_name(value["name"]):
            raise self._broken(f"{self.path}: {value['name'][:80]!r} cannot be an adapter's name")
        return Loaded(**{name: value[name] for name in kinds})

    def _broken(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what}\n"
            "  it lists the adapters that were loaded over HTTP: mend it, or move it away to start without them"
        )
