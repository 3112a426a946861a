"""One table, on the terminal and in a page: the same cells in both, and nothing that a name could inject."""

from __future__ import annotations

import io
from html.parser import HTMLParser

from rich.console import Console

from lorakit.analysis.tables import Table, html_page, mean, printable

EVIL = "<b onclick=x>[red]\x1b[31m&"


def shown(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


class Cells(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_terminal_and_page_have_the_same_cells():
    table = Table("sizes", ["module", "rank"], [["q_proj", "4"], [EVIL, "16"]], "a note")
    cells = ["sizes", "module", "rank", "q_proj", "4", printable(EVIL), "16"]
    page = Cells(html_page("a page", [table.html()]))
    assert [text for text in page.texts if text in cells] == cells
    assert "a note" in page.texts
    assert all(cell in shown(table) for cell in cells)
    assert "\x1b" not in shown(table) + "".join(page.texts)
    assert not {"b", "script", "link"} & set(page.tags)


def test_a_title_is_escaped_too():
    page = Cells(html_page(EVIL, []))
    assert page.texts.count(printable(EVIL)) == 2  # the title and the heading
    assert "b" not in page.tags


def test_a_mean_is_over_the_known_values():
    assert mean([1.0, None, 2.0], ".2f") == "1.50"
    assert mean([None], ".2f") == ""
