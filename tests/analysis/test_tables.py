"""One table, on the terminal and in a page: the same cells in both, and nothing that a name could inject."""

from __future__ import annotations

import io
from html.parser import HTMLParser

from rich.console import Console

from lorakit.analysis.tables import Table, html_page, mean, printable

EVIL = "<b onclick=x>[red]\x1b[31m&"


def shown(table: Table, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
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


NAME = "model.layers.10.self_attn.q_proj"
WIDE = Table("norms", ["module", "in", "out", "a long head", "last"], [[NAME, "1,024", "4,096", "0.123", "9"]] * 2)


def test_a_table_that_fits_has_its_names_and_figures_side_by_side():
    lines = shown(WIDE, 80).splitlines()
    assert len(lines) == 4
    assert lines[2].split() == [NAME, "1,024", "4,096", "0.123", "9"]
    assert lines[1].index("in") + 1 == lines[2].index("1,024") + 4  # right-aligned


def test_names_too_long_for_the_rest_get_lines_of_their_own():
    lines = shown(WIDE, 45).splitlines()
    assert lines.count(NAME) == 2
    assert max(map(len, lines)) <= 45
    assert lines[lines.index(NAME) + 1].split() == ["1,024", "4,096", "0.123", "9"]


def test_columns_beyond_the_width_follow_in_a_second_table():
    table = Table("", ["m", *(f"column {i}" for i in range(6))], [["a", *"012345"]])
    lines = shown(table, 40).splitlines()
    assert [line.split() for line in lines if line.startswith("a")] == [["a", *"0123"], ["a", *"45"]]
    assert max(map(len, lines)) <= 40


def test_nothing_is_cut_in_the_narrowest_terminal():
    text = "".join(shown(WIDE, 12).split())
    assert all(text.count(cell) >= 2 for cell in (NAME, "1,024", "4,096", "0.123"))


def test_wide_characters_take_two_columns():
    lines = shown(Table("", ["name", "value"], [["注意力", "1"], ["q_proj", "2"]])).splitlines()
    assert lines[1].endswith("     1")
    assert len(lines[1]) + 3 == len(lines[2])


def test_heads_of_several_lines_stand_on_the_figures():
    lines = shown(Table("", ["module", "|W|\nmin", "max"], [["q_proj", "1.5", "2.5"]])).splitlines()
    assert [line.split() for line in lines] == [["|W|"], ["module", "min", "max"], ["q_proj", "1.5", "2.5"]]
