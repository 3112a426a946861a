"""Show untrusted text on a page, so that it cannot become Markdown, HTML or YAML, and without local paths."""

from __future__ import annotations

import math
import os
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

MAX_CHARACTERS = 200  # of a value
# the last two would link bare addresses
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$&@]|(?<=:)//|(?<=\bwww)\.)", re.IGNORECASE)
# A path in a text: /a/b, ~/a, ./a, ../a, C:\a, \\a\b, file:///a/b, note:/a/b; but not the slashes of a URL, of 1/2, of
# </s>, of OWNER/NAME or of a regular expression.
_PART = r"[^\s/\\'\"`<>|,;:*?()\[\]{}]+"
_PATH = re.compile(
    r"(?:(?<![\w:/.\\~-])|(?<=\w\w:)(?=/[^/]))(?:file:(?://)?)?"
    rf"((?:~[\w.-]*|[A-Za-z]:)(?:[\\/]+{_PART})+|\.{{1,2}}(?:/+{_PART})+|(?:/+{_PART}){{2,}}|\\\\{_PART}(?:\\+{_PART})+)[/\\]*"
)
# A text that is nothing but a path.
_PATH_ALONE = re.compile(r"(?:file:)?(?:/.*/[^/]*|\\\\.*\\[^\\]*|\.{1,2}/.*|(?:~[\w.-]*|[A-Za-z]:)[\\/].*)")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)[/\\]snapshots[/\\]")
# Common folder names, which are not owners on the hub.
_FOLDERS = {
    "models",
    "model",
    "runs",
    "checkpoints",
    "output",
    "outputs",
    "out",
    "data",
    "datasets",
    "spaces",
    "merged",
}


def line(value: Any, most: int = MAX_CHARACTERS) -> str:
    """Return one line of printable text, without local paths, at most `most` characters long."""
    text = without_paths(" ".join("".join(c if c.isprintable() else " " for c in str(value)[: 8 * most]).split()))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def plain(value: Any, most: int = MAX_CHARACTERS) -> str:
    """Return text for a paragraph or table cell, with every special character of Markdown and HTML escaped."""
    return _SPECIAL.sub(r"\\\1", line(value, most))


def cell(text: str, most: int) -> str:
    """Return text of several lines for a table cell, with its line breaks. Paths are content here, and kept."""
    clean = "\n".join(
        "".join(c if c.isprintable() else " " for c in row) for row in text[: 2 * most].splitlines()
    ).strip()
    clean = clean if len(clean) <= most else clean[: most - 1].rstrip() + "…"
    return _SPECIAL.sub(r"\\\1", clean).replace("\n", "<br>")


def code(value: Any, most: int = MAX_CHARACTERS) -> str:
    """Return a code span, which may be in a table: delimited by more backticks than the text has in a row."""
    text = line(value, most)
    if not text:
        return ""
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text.replace('|', chr(92) + '|')}{space}{ticks}"


def fence(text: str, language: str = "") -> str:
    """Return a code block whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def number(value: Any) -> float | int | None:
    """Return `value` if it is a finite number, otherwise None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def without_paths(text: str) -> str:
    """Cut local paths in a text to their last component."""
    return last_name(text.rstrip("/\\")) if is_local_path(text) else _PATH.sub(lambda m: last_name(m[1]), text)


def is_local_path(text: str) -> bool:
    """Whether a text is nothing but a path: absolute, from a home folder, or relative with ./ or ../."""
    return _PATH_ALONE.fullmatch(text) is not None


def last_name(path: str) -> str:
    """Return the last component of a POSIX or Windows path."""
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
    return (
        _REPOSITORY.fullmatch(name) is not None
        and ".." not in name
        and "--" not in name
        and not name.endswith((".", "-", ".git"))
    )


def hub_id(name: Any) -> str | None:
    """Return the hub id that a name is, or that a folder of the hub's cache belongs to; None if there is none."""
    if not isinstance(name, str):
        return None
    cached = _CACHED.search(name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return None if not is_hub_name(name) or is_path(name) or name.split("/")[0] in _FOLDERS else name
