"""Recognise local paths in an adapter's metadata, cut them to their last component where safe, and report all of them.

Cut: a value that is nothing but a path, or an option with one (`--data=/a/b`); a base or dataset that is not a hub id
and has a slash. Left: a path inside a text, in a key, or among module names, which may be regular expressions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# A path in a text: /a/b, ~/a, ./a, ../a, C:\a, \\a\b, file:///a/b, note:/a/b; but not the slashes of a URL, of 1/2, of
# </s>, of OWNER/NAME or of a regular expression.
_PART = r"[^\s/\\'\"`<>|,;:*?()\[\]{}]+"
_PATH = re.compile(
    r"(?:(?<![\w:/.\\~-])|(?<=\w\w:)(?=/[^/]))(?:file:(?://)?)?"
    rf"((?:~[\w.-]*|[A-Za-z]:)(?:[\\/]+{_PART})+|\.{{1,2}}(?:/+{_PART})+|(?:/+{_PART}){{2,}}|\\\\{_PART}(?:\\+{_PART})+)[/\\]*"
)
# A text that is nothing but a path.
_PATH_ALONE = re.compile(r"(?:file:)?(?:/.*/[^/]*|\\\\.*\\[^\\]*|\.{1,2}/.*|(?:~[\w.-]*|[A-Za-z]:)[\\/].*)")
_OPTION = re.compile(r"(-{0,2}[A-Za-z][\w.-]*=)(\S+)")
_URL = re.compile(r"\b(?!file:)[A-Za-z][A-Za-z0-9+.-]*://\S+")
_REPOSITORY = re.compile(
    r"(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])(?<!\.git)", re.ASCII
)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)[/\\]snapshots[/\\]")
# Common folder names, which are not owners on the hub.
_FOLDERS = {"model", "models", "merged", "runs", "checkpoints", "out", "output", "outputs"}
_FOLDERS |= {"data", "datasets", "spaces"}

_BASE = "base_model_name_or_path"
_BASES = (_BASE, "model")  # PEFT's key; MLX's, and the one in lorakit's recipes
_NAMES = (*_BASES, "data", "validation")  # keys of hub ids or paths
_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")


def without_paths(text: str) -> str:
    """Cut local paths in a text to their last component."""
    return last_name(text) if is_local_path(text) else _PATH.sub(lambda m: last_name(m[1]), text)


def holds_path(text: str) -> bool:
    """Whether a text contains a local path. URLs do not count."""
    rest = _URL.sub(" ", text)
    return without_paths(rest) != rest


def is_local_path(text: str) -> bool:
    """Whether a text is nothing but a path: absolute, from a home folder, or relative with ./ or ../."""
    return _PATH_ALONE.fullmatch(text) is not None


def last_name(path: str) -> str:
    """Return the last component of a POSIX or Windows path."""
    path = path.rstrip("/\\")
    return PureWindowsPath(path).name or PurePosixPath(path).name


def is_path(name: str) -> bool:
    """Whether a name is a local path: by its form, or because it exists here."""
    return (
        name.startswith((".", "/", "~", "\\", "file:"))
        or "\\" in name
        or name.count("/") > 1
        or bool(re.match(r"[A-Za-z]:", name))
        or os.path.exists(os.path.expanduser(name))  # False also for names that are too long
    )


def is_hub_name(name: str) -> bool:
    """Whether a name has the hub's form OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def hub_id(name: Any) -> str | None:
    """Return the hub id that a name is, or that a folder of the hub's cache belongs to; None if there is none."""
    if not isinstance(name, str):
        return None
    if cached := _CACHED.search(name):
        return f"{cached[1]}/{cached[2]}"
    return None if not is_hub_name(name) or is_path(name) or name.split("/")[0] in _FOLDERS else name


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
            places = {name: f"{where}, {_shown(name)}" for name in value}
            self.left += [(places[name], "the key holds a local path") for name in value if holds_path(name)]
            return {name: self.clean(v, places[name], name) for name, v in value.items()}
        if isinstance(value, list):
            return [self.clean(v, f"{where}[{i}]", key) for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        clean, renamed = self._cut(value, key)
        if clean != value:
            self.cut.append((where, f"{'the base is called' if renamed else 'a local path is cut to'} {clean!r}"))
        elif holds_path(value):
            self.left.append((where, "holds a local path"))
        return clean

    def clean_text(self, text: str, where: str, key: str) -> str:
        """Return a header's value without local paths. If it is not JSON, or nested too deeply, it is a text."""
        with suppress(ValueError, RecursionError):
            value, inner = json.loads(text), PathCleaner(self.base_model)
            if isinstance(value, dict | list):
                clean = inner.clean(value, where, key)
                text = text if clean == value else json.dumps(clean, sort_keys=True)
                self.cut += inner.cut
                self.left += inner.left
                return text
        return self.clean(text, where, key)

    def _cut(self, value: str, key: str) -> tuple[str, bool]:
        """Return (the value without its path, whether it is a base's or dataset's hub id)."""
        if key in _PATTERNS:
            return value, False
        if key in _NAMES:
            name = self.base_model if self.base_model and key in _BASES else hub_id(value)
            if name is not None:
                return name, True
            is_text = key != _BASE and any(c.isspace() for c in value)
            if not is_text and not _URL.match(value):
                name = last_name(value) if "/" in value or is_path(value) else value
                return (value if name in ("", ".", "..") else name), False
        option = _OPTION.fullmatch(value)
        before, path = option.groups() if option else ("", value)
        return (before + without_paths(path) if is_local_path(path) else value), False


def _shown(key: str) -> str:
    """Return an untrusted key in printable form, for a terminal."""
    shown = key if key.isprintable() else ascii(key)
    return shown if len(shown) <= 120 else shown[:119] + "…"
