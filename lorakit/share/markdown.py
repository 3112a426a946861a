"""Show untrusted text on a page, so that it cannot become Markdown, HTML or YAML, and without local paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .paths import without_paths

MAX_CHARACTERS = 200  # of a value
# the last two would link bare addresses
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$&@]|(?<=:)//|(?<=\bwww)\.)", re.IGNORECASE)


class Markdown(str):
    """Text that is Markdown already: what a template inserts is escaped unless it is of this class."""

    __slots__ = ()


def line(value: Any, most: int = MAX_CHARACTERS) -> str:
    """Return one line of printable text, without local paths, at most `most` characters long."""
    return _shortened(without_paths(" ".join(_printable(str(value)[: 8 * most]).split())), most)


def plain(value: Any, most: int = MAX_CHARACTERS) -> Markdown:
    """Return text for a paragraph or table cell, with every special character of Markdown and HTML escaped."""
    return value if isinstance(value, Markdown) else Markdown(_SPECIAL.sub(r"\\\1", line(value, most)))


def cell(text: str, most: int) -> Markdown:
    """Return text of several lines for a table cell, with its line breaks. Paths are content here, and kept."""
    clean = "\n".join(map(_printable, text[: 2 * most].splitlines())).strip()
    return Markdown(_SPECIAL.sub(r"\\\1", _shortened(clean, most)).replace("\n", "<br>"))


def code(value: Any, most: int = MAX_CHARACTERS) -> Markdown:
    """Return a code span, which may be in a table: delimited by more backticks than the text has in a row."""
    text = line(value or "", most)
    ticks = "`" * (1 + _longest_run(text)) if text else ""
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{ticks}{space}{text.replace('|', chr(92) + '|')}{space}{ticks}")


def codes(values: Iterable[Any], most: int) -> Markdown:
    """Return the first `most` values as code spans, and how many there are more."""
    spans = [code(value) for value in values]
    more = f" and {len(spans) - most} more" if len(spans) > most else ""
    return Markdown(", ".join(spans[:most]) + more)


def fence(text: str, language: str = "") -> Markdown:
    """Return a code block whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + _longest_run(text))
    return Markdown(f"{ticks}{language}\n{text.rstrip()}\n{ticks}")


def table(cells: Sequence[Sequence[str]], head: Sequence[str], align: str = "---") -> Markdown:
    """Return a table of Markdown; "" if there are no rows. align: of all columns but the first."""
    rule = "|".join(["---", *[align] * (len(head) - 1)])
    lines = [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in cells)]
    return Markdown("\n".join(lines) if cells else "")


def rows(text: str) -> Markdown:
    """Return a table of the lines `| name | value |` in a text that have a value; "" if none has."""
    lines = [row for row in text.splitlines() if row and not row.endswith("|  |")]
    return Markdown("\n".join(["| | |", "|---|---|", *lines]) if lines else "")


def section(text: str, title: str) -> Markdown:
    """Return a section with its heading, its paragraphs one blank line apart; "" if there is nothing in it."""
    text = re.sub(r"\n{3,}", "\n\n", text.strip())
    return Markdown(f"## {title}\n\n{text}\n\n" if text else "")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
