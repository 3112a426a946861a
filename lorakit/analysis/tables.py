"""A table for the terminal and for an HTML page, and that page: one file without scripts or external resources."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

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


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text, the first column left-aligned. note: explains the columns, in HTML."""

    title: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    note: str = ""

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(Text(self.heads[0]), overflow="fold", vertical="bottom", min_width=9)
        for head in self.heads[1:]:
            table.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
        for row in self.cells:
            table.add_row(*(Text(printable(cell)) for cell in row))
        return Group(Text(printable(self.title), style="italic"), table) if self.title else table

    def html(self) -> str:
        """Return the table with its title as a heading."""
        head = "".join(f"<th>{escaped(h)}</th>" for h in self.heads)
        body = "".join("<tr>" + "".join(f"<td>{escaped(c)}</td>" for c in row) + "</tr>\n" for row in self.cells)
        note = f"<p>{escaped(self.note)}</p>\n" if self.note else ""
        return f'<h2>{escaped(self.title)}</h2>\n{note}<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


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
