"""lorakit's exceptions, and helpers for their messages: what is wrong, where, what was expected, how to fix it.

Every error a user can cause is a `LorakitError`; the command line prints it without a traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_GIT_LFS = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/")
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|\?xml)\b", re.I | re.S)
# What servers answer instead of a file, as plain text.
_ANSWERS = (
    b"Entry not found",
    b"404: Not Found",
    b"Not Found",
    b"Repository not found",
    b"Access to model",
    b"Access denied",
    b"Invalid username or password",
    b"Unauthorized",
)


class LorakitError(Exception):
    """An error the user can fix. Its first line says what and where, the next lines what was expected and the fix."""


class ConfigError(LorakitError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class TargetError(LorakitError, ValueError):
    """A target, pattern or key matches no module of the model, or matches one that cannot be adapted."""


class AdapterError(LorakitError, ValueError):
    """An adapter, in memory or in a file, is malformed or does not fit the base model."""


class StateError(LorakitError, RuntimeError):
    """A call does not fit the adapters attached: the name is taken or unknown, or the adapter is merged already."""


class DataError(LorakitError, ValueError):
    """A dataset cannot be read or understood; the message names file and row."""


class TrainError(LorakitError, RuntimeError):
    """A training run cannot start or continue."""


class StoppedError(TrainError):
    """A signal stopped the work. `signal`: its name, such as "SIGINT"."""

    def __init__(self, message: str, signal: str):
        super().__init__(message)
        self.signal = signal


class WriteError(LorakitError, OSError):
    """A file or folder cannot be written: the path is taken, permission is denied or the disk is full."""


class NotFiniteError(LorakitError, RuntimeError):
    """A loss is NaN or infinite."""


class LorakitWarning(UserWarning):
    """Something that was done as asked and may surprise. The command line prints it as one note on stderr."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`, None if none is similar enough."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"`, or "" if no known name is similar."""
    suggestion = nearest(name, known)
    return f"; did you mean '{suggestion}'?" if suggestion else ""


def listing(names: Iterable[str], most: int = 5) -> str:
    """Join the first `most` names and say how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def not_the_file(path: Path) -> str | None:
    """Say what stands in a file's place, with the fix: a git-lfs pointer, a web page, a server's answer; else None."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    again = (
        "\n  download the file itself: its page's download link (on the hub: resolve/, not blob/), or give OWNER/NAME"
    )
    if _GIT_LFS.match(head):
        size = re.search(rb"\nsize (\d+)", head)
        of = f" of {int(size[1]):,} bytes" if size else ""
        return (
            f"{path} is a git-lfs pointer: it only says which file{of} belongs here\n"
            "  fetch the file: git lfs install, then git lfs pull in its repository; or download it from the hub"
        )
    if head.startswith((b"/annex/objects/", b".git/annex/objects/")):
        return f"{path} is a git-annex pointer, not the file itself\n  fetch the file: git annex get {path.name}"
    if _PAGE.match(head):
        kind = "an XML page, a server's answer" if b"?xml" in head[:64].lower() else "a web page (HTML)"
        return f"{path} is {kind}, not the file itself{again}"
    if head.strip().startswith(_ANSWERS) and len(head) < 512:
        text = head.decode("utf8", "replace").strip().splitlines()[0][:80]
        return f"{path} holds a server's answer, '{text}', not the file itself{again}"
    return None


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "names with values",
}


def expectation(items: Sequence[Mapping[str, Any]]) -> str:
    """Say what pydantic expected of a value. `items`: its errors for it, several for the members of a union."""
    found = []
    for item in items:
        kind, _, problem = item["type"].partition("_")
        if kind in _TYPES and problem in ("type", "parsing", "from_float"):
            found.append(_TYPES[kind])
        elif kind == "literal":
            found.append(item["msg"].removeprefix("Input should be "))
        else:
            return f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"expected {' or '.join(dict.fromkeys(found))}"


def choices(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the values that pydantic expected, from its errors for one setting; empty if any value may do."""
    return [name for i in items if i["type"] == "literal_error" for name in re.findall(r"'([^']*)'", i["msg"])]
