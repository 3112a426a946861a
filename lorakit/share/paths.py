"""Local paths in what an adapter says of itself (JSON): cut to their last name where that is safe, else left, and both are told.

Cut: a value that is a path as a whole, or an option that has one (`--data=/a/b`); a base or data that is no hub id and has a slash.
Left: a path inside a text, in a key, or among the names of modules, which may be regular expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .words import hub_id, is_local_path, is_path, last_name, without_paths

_BASE = "base_model_name_or_path"
_BASES = (_BASE, "model")  # PEFT's name; MLX's, and that of lorakit's recipes
_PLACES = (*_BASES, "data", "validation")  # hub ids or paths
_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_OPTION = re.compile(r"(-{0,2}[A-Za-z][\w.-]*=)(\S+)")
_URL = re.compile(r"\b(?!file:)[A-Za-z][A-Za-z0-9+.-]*://\S+")


@dataclass
class Paths:
    """What is found in one adapter. `base_model`: how its base is to be called; `cut`: (where, what was done); `left`: (where, what it is)."""

    base_model: str | None = None
    cut: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def clean(self, value: Any, where: str, key: str = "") -> Any:
        """A JSON value without local paths, as far as that is safe. `key`: the one that it (or its list) stands under."""
        if isinstance(value, Mapping):
            for name in value:
                if holds_path(name):
                    self.left.append((f"{where}, {_shown(name)}", "the key holds a local path"))
            return {name: self.clean(v, f"{where}, {_shown(name)}", name) for name, v in value.items()}
        if isinstance(value, list):
            return [self.clean(v, f"{where}[{i}]", key) for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        clean = value if key in _PATTERNS else self._name(value, where, key) if key in _PLACES else _whole(value)
        if clean == value and holds_path(value):
            self.left.append((where, "holds a local path"))
        elif clean != value and self.cut[-1:] != [(where, f"the base is called {clean!r}")]:
            self.cut.append((where, f"a local path is cut to {clean!r}"))
        return clean

    def clean_text(self, text: str, where: str, key: str) -> str:
        """A header's value, which may be JSON itself; what is none, or nested too deep, is a text."""
        inner = Paths(self.base_model)
        try:
            value = json.loads(text)
            clean = inner.clean(value, where, key) if isinstance(value, dict | list) else None
        except (ValueError, RecursionError):
            clean = None
        if clean is None:
            return self.clean(text, where, key)
        self.cut += inner.cut
        self.left += inner.left
        return text if clean == value else json.dumps(clean, sort_keys=True)

    def _name(self, value: str, where: str, key: str) -> str:
        """The name of a base or of data: a hub id stays, a folder of the hub's cache becomes one, another path is cut."""
        found = hub_id(value)
        if key in _BASES and self.base_model is not None:
            found = self.base_model
        if found is not None:
            if found != value:
                self.cut.append((where, f"the base is called {found!r}"))
            return found
        if _URL.match(value) or (key != _BASE and any(c.isspace() for c in value)):  # the latter is a text
            return _whole(value)
        name = last_name(value.rstrip("/\\")) if "/" in value or is_path(value) else value
        return value if name in ("", ".", "..") else name


def holds_path(text: str) -> bool:
    """Whether a local path is in a text. (What follows a URL's scheme is none.)"""
    rest = _URL.sub(" ", text)
    return without_paths(rest) != rest


def _whole(value: str) -> str:
    option = _OPTION.fullmatch(value)
    if option is not None and is_local_path(option[2]):
        return option[1] + without_paths(option[2])
    return without_paths(value) if is_local_path(value) else value


def _shown(key: str) -> str:
    """A key for a line on a terminal: it may come from somebody else."""
    shown = key if key.isprintable() else ascii(key)
    return shown if len(shown) <= 120 else shown[:119] + "…"
