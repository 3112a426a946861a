"""Somebody else's words on a page: as text that cannot become Markdown, HTML or YAML, and without the paths of their machine."""

from __future__ import annotations

import math
import os
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

MOST = 200  # characters of a value
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$&@]|(?<=:)//|(?<=\bwww)\.)", re.IGNORECASE)  # the last two make links of bare addresses
# A path in a text: /a/b, ~/a, ./a, ../a, C:\a, \\a\b, file:///a/b, note:/a/b; not the slashes of a URL, of 1/2, of </s>, of OWNER/NAME or of
# a regular expression. And a text that is one.
_PART = r"[^\s/\\'\"`<>|,;:*?()\[\]{}]+"
_PATH = re.compile(
    r"(?:(?<![\w:/.\\~-])|(?<=\w\w:)(?=/[^/]))(?:file:(?://)?)?"
    rf"((?:~[\w.-]*|[A-Za-z]:)(?:[\\/]+{_PART})+|\.{{1,2}}(?:/+{_PART})+|(?:/+{_PART}){{2,}}|\\\\{_PART}(?:\\+{_PART})+)[/\\]*"
)
_WHOLE = re.compile(r"(?:file:)?(?:/.*/[^/]*|\\\\.*\\[^\\]*|\.{1,2}/.*|(?:~[\w.-]*|[A-Za-z]:)[\\/].*)")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)[/\\]snapshots[/\\]")
# First parts of relative paths that nobody owns on the hub.
_FOLDERS = {"models", "model", "runs", "checkpoints", "output", "outputs", "out", "data", "datasets", "spaces", "merged"}


def line(value: Any, most: int = MOST) -> str:
    """One line of printable text, without local paths, cut to `most` characters."""
    text = without_paths(" ".join("".join(c if c.isprintable() else " " for c in str(value)[: 8 * most]).split()))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def plain(value: Any, most: int = MOST) -> str:
    """Text for a paragraph or a table's cell, every character with a meaning in Markdown or HTML escaped."""
    return _SPECIAL.sub(r"\\\1", line(value, most))


def cell(text: str, most: int) -> str:
    """Text of several lines for a table's cell, its own line ends kept; paths in it are content, and stay."""
    clean = "\n".join("".join(c if c.isprintable() else " " for c in row) for row in text[: 2 * most].splitlines()).strip()
    clean = clean if len(clean) <= most else clean[: most - 1].rstrip() + "…"
    return _SPECIAL.sub(r"\\\1", clean).replace("\n", "<br>")


def code(value: Any, most: int = MOST) -> str:
    """A code span, in a table too: with more backticks around it than are in it."""
    text = line(value, most)
    if not text:
        return ""
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text.replace('|', chr(92) + '|')}{space}{ticks}"


def fence(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def number(value: Any) -> float | int | None:
    """A finite number, or None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def without_paths(text: str) -> str:
    """Local paths in a text cut to their last name."""
    return last_name(text.rstrip("/\\")) if is_local_path(text) else _PATH.sub(lambda m: last_name(m[1]), text)


def is_local_path(text: str) -> bool:
    """Whether a text as a whole is a path: from the root, from a home, or from the folder that one is in (./ and ../)."""
    return _WHOLE.fullmatch(text) is not None


def last_name(path: str) -> str:
    return PureWindowsPath(path).name or PurePosixPath(path).name


def is_path(name: str) -> bool:
    """Whether a name is that of a place on somebody's machine."""
    return (
        name.startswith((".", "/", "~", "\\", "file:"))
        or "\\" in name
        or name.count("/") > 1
        or bool(re.match(r"[A-Za-z]:", name))
        or os.path.exists(os.path.expanduser(name))  # (False, too, for what is too long to be a name)
    )


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form OWNER/NAME that the hub has."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name and not name.endswith((".", "-", ".git"))


def hub_id(name: Any) -> str | None:
    """OWNER/NAME if that is what a name is, and not a local folder; the id, too, of a folder in huggingface_hub's cache."""
    if not isinstance(name, str):
        return None
    cached = _CACHED.search(name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return None if not is_hub_name(name) or is_path(name) or name.split("/")[0] in _FOLDERS else name
