"""A table for the terminal and for an HTML page, and that page: one file without scripts or external resources."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636e; --back: #fff; --panel: #f6f8fa; --line: #d8dee4; }
:root { --train: #7c8da3; --held: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --muted: #9aa4af; --back: #0d1117; --panel: #161b22; --line: #30363d; }
  :root { --train: #8296ad; --held: #fb923c; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
body { color: var(--text); background: var(--back); }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere; }
img { max-width: 100%; border: 1px solid var(--line); } p { margin: .3rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: var(--panel); }
"""


INDENT = 2  # of a row's figures below its name
LONGEST = 100  # characters of a recorded text, such as a chat template, that are shown in full


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text, the first column left-aligned. note: explains the columns, in HTML.

    On the terminal no cell is cut. A table that is too wide becomes several, each with some of the columns; where the
    names leave too little room beside them, each has a line of its own above its row.
    """

    title: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.cells import cell_len
        from rich.text import Text

        widths = self._widths()
        if self.title:
            yield Text(printable(self.title), style="italic")
        rows = [[printable(cell) for cell in row] for row in self.cells]
        heads = [head.split("\n") for head in self.heads]
        beside = _groups(widths[1:], options.max_width - widths[0] - 1)
        below = _groups(widths[1:], options.max_width - INDENT)
        too_long = widths[0] + 1 + max(widths[1:], default=0) > options.max_width
        own_lines = len(below) < len(beside) or (too_long and len(widths) > 1)
        first = INDENT - 1 if own_lines else widths[0]

        def line(name: str, cells: Iterable[tuple[str, int]], style: str = "") -> Text:
            text = name + " " * (first - cell_len(name))
            text += "".join(" " * (1 + widths[column] - cell_len(cell)) + cell for cell, column in cells)
            return Text(text.rstrip(), style=style, overflow="fold")

        for i, columns in enumerate(below if own_lines else beside):
            if i:
                yield Text()
            shown = [heads[column] for column in (0, *columns)]
            for k in range(-max(map(len, shown)), 0):
                name, *parts = (head[k] if -k <= len(head) else "" for head in shown)
                yield line("" if own_lines else name, zip(parts, columns, strict=True), "bold")
            for row in rows:
                if own_lines:
                    yield Text(row[0], overflow="fold")
                yield line("" if own_lines else row[0], ((row[c], c) for c in columns))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.cells import cell_len
        from rich.measure import Measurement

        widest = max(sum(self._widths()) + len(self.heads) - 1, cell_len(printable(self.title)))
        return Measurement(min(1, widest), widest).with_maximum(options.max_width)

    def _widths(self) -> list[int]:
        """Of each column, in columns of the terminal."""
        from rich.cells import cell_len

        parts = (
            [*head.split("\n"), *map(printable, cells)] for head, *cells in zip(self.heads, *self.cells, strict=True)
        )
        return [max(map(cell_len, part)) for part in parts]

    def html(self) -> str:
        """Return the table with its title as a heading."""
        head = "".join(f"<th>{escaped(h)}</th>" for h in self.heads)
        body = "".join("<tr>" + "".join(f"<td>{escaped(c)}</td>" for c in row) + "</tr>\n" for row in self.cells)
        note = f"<p>{escaped(self.note)}</p>\n" if self.note else ""
        return f'<h2>{escaped(self.title)}</h2>\n{note}<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Group the columns after the first into as few tables as fit into `room` characters."""
    groups: list[list[int]] = [[]]
    used = 0
    for column, width in enumerate(widths, start=1):
        if groups[-1] and used + width + 1 > room:
            groups.append([])
            used = 0
        groups[-1].append(column)
        used += width + 1
    return groups


def html_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a page, for light and dark screens. parts: HTML; style: CSS beside that of all pages."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"\n<title>{escaped(title)}</title><style>{_STYLE}{style}</style>"
    body = "\n".join([f"<h1>{escaped(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}\n</body></html>\n'


def escaped(text: str) -> str:
    """Return text from a file for HTML."""
    return html.escape(printable(text))


def printable(text: str) -> str:
    """Return text from a file with its control characters replaced, safe for a terminal or a page."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def mean(values: Iterable[float | None], spec: str) -> str:
    """Format the mean of the known values; "" if there are none."""
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), spec) if known else ""


def brief(value: Any) -> str:
    """Format a value for reading; `--json` has all of it."""
    if isinstance(value, Mapping) and len(value) > 8:
        return f"({len(value):,} entries)"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:40]}… ({len(value):,} characters)"
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)
