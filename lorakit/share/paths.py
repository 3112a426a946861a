"""Cut local paths in an adapter's JSON metadata to their last component where that is safe, and report all of them.

Cut: a value that is nothing but a path, or an option with one (`--data=/a/b`); a base or dataset that is not a hub id
and has a slash. Left: a path inside a text, in a key, or among module names, which may be regular expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .words import hub_id, is_local_path, is_path, last_name, without_paths

_BASE = "base_model_name_or_path"
_BASES = (_BASE, "model")  # PEFT's key; MLX's, and the one in lorakit's recipes
_NAMES = (*_BASES, "data", "validation")  # keys of hub ids or paths
_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_OPTION = re.compile(r"(-{0,2}[A-Za-z][\w.-]*=)(\S+)")
_URL = re.compile(r"\b(?!file:)[A-Za-z][A-Za-z0-9+.-]*://\S+")


@dataclass
class PathCleaner:
    """Cleans one adapter's metadata and keeps a record of its local paths.

    base_model: the hub id to call the base by. cut: (where, what was done). left: (where, what is there).
    """

    base_model: str | None = None
    cut: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def clean(self, value: Any, where: str, key: str = "") -> Any:
        """Return a JSON value without local paths, as far as is safe. key: the key of the value, or of its list."""
        if isinstance(value, Mapping):
            for name in value:
                if holds_path(name):
                    self.left.append((f"{where}, {_shown(name)}", "the key holds a local path"))
            return {name: self.clean(v, f"{where}, {_shown(name)}", name) for name, v in value.items()}
        if isinstance(value, list):
            return [self.clean(v, f"{where}[{i}]", key) for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        clean = value if key in _PATTERNS else self._name(value, where, key) if key in _NAMES else _cut_path(value)
        if clean == value and holds_path(value):
            self.left.append((where, "holds a local path"))
        elif clean != value and self.cut[-1:] != [(where, f"the base is called {clean!r}")]:
            self.cut.append((where, f"a local path is cut to {clean!r}"))
        return clean

    def clean_text(self, text: str, where: str, key: str) -> str:
        """Return a header's value without local paths. If it is not JSON, or nested too deeply, it is a text."""
        inner = PathCleaner(self.base_model)
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
        """Return a base's or dataset's hub id, also for a folder of the hub's cache, or else its last component."""
        name = hub_id(value)
        if key in _BASES and self.base_model is not None:
            name = self.base_model
        if name is not None:
            if name != value:
                self.cut.append((where, f"the base is called {name!r}"))
            return name
        if _URL.match(value) or (key != _BASE and any(c.isspace() for c in value)):  # a text, if it has spaces
            return _cut_path(value)
        name = last_name(value.rstrip("/\\")) if "/" in value or is_path(value) else value
        return value if name in ("", ".", "..") else name


def holds_path(text: str) -> bool:
    """Whether a text contains a local path. URLs do not count."""
    rest = _URL.sub(" ", text)
    return without_paths(rest) != rest


def _cut_path(value: str) -> str:
    """Cut a value that is a path, or an option with one, to the last component; return any other unchanged."""
    option = _OPTION.fullmatch(value)
    if option is not None and is_local_path(option[2]):
        return option[1] + without_paths(option[2])
    return without_paths(value) if is_local_path(value) else value


def _shown(key: str) -> str:
    """Return an untrusted key in printable form, for a terminal."""
    shown = key if key.isprintable() else ascii(key)
    return shown if len(shown) <= 120 else shown[:119] + "…"
