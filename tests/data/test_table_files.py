"""Tables as users have them: unquoted, without a header, with numbered columns; and lines that begin with a label."""

from __future__ import annotations

import pytest

from lorakit.data.read import read_rows, stream_rows
from lorakit.errors import DataError

NUMBERED = {"text": "4", "label": "2"}


def write(path, text, encoding="utf8"):
    path.write_bytes(text.encode(encoding))
    return path


def values(rows):
    return [row.values for row in rows]


def test_a_table_without_a_header_has_numbered_columns(tmp_path):
    """As CoLA's files."""
    path = write(tmp_path / "a.tsv", "gj04\t1\t\tA dog sat.\ngj04\t0\t*\tSat dog a.\n")
    rows = read_rows(path, columns=NUMBERED)
    assert values(rows) == [
        {"1": "gj04", "2": "1", "3": "", "4": "A dog sat."},
        {"1": "gj04", "2": "0", "3": "*", "4": "Sat dog a."},
    ]
    assert [row.number for row in rows] == [1, 2]
    assert values(stream_rows(path, columns=NUMBERED)) == values(rows)
    assert read_rows(write(tmp_path / "a.csv", "x,1\ny,0\n"), columns={"text": "1"})[0].values == {"1": "x", "2": "1"}


def test_without_numbers_the_first_line_is_the_header(tmp_path):
    path = write(tmp_path / "a.tsv", "sentence\tlabel\nso\t1\n")
    assert values(read_rows(path, columns={"text": "sentence"})) == [{"sentence": "so", "label": "1"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # quotes are characters, also where a field begins with one, as in GLUE's files
        ('s\tlabel\n"So," she said\t1\n"as\t0\n', ['"So," she said', '"as']),
        # as quoted it can be read, but a field would span two lines
        ('s\tlabel\n"so\t1\nas"\t0\n', ['"so', 'as"']),
        # quoted: a tab and a doubled quote inside
        ('s\tlabel\n"a\tb"\t1\n"say ""hi"""\t0\n', ["a\tb", 'say "hi"']),
        # quoted: a line end inside, which leaves uneven lines
        ('s\tlabel\n"a\nb"\t1\nc\t0\n', ["a\nb", "c"]),
        ('s\tlabel\r\n"a" b\t1\r\nc\t0\r\n', ['"a" b', "c"]),
    ],
)
def test_tab_separated_files_are_quoted_or_not_by_what_they_hold(tmp_path, text, expected):
    path = write(tmp_path / "a.tsv", text)
    assert [row.values["s"] for row in read_rows(path)] == expected


def test_a_txt_file_with_tabs_is_a_table_where_columns_are_named(tmp_path):
    """As MRPC's files, which begin with a byte order mark."""
    path = write(tmp_path / "a.txt", '\ufeffQuality\t#1 String\n1\tHe said "no".\n0\t"No", he said.\n')
    found = read_rows(path, columns={"text": "#1 String", "label": "Quality"})
    assert values(found) == [
        {"Quality": "1", "#1 String": 'He said "no".'},
        {"Quality": "0", "#1 String": '"No", he said.'},
    ]
    assert list(read_rows(path)[0].values) == ["text"]  # prose
    prose = write(tmp_path / "b.txt", "One.\nTwo.\n")
    assert values(read_rows(prose, columns={"text": "text"})) == [{"text": "One.\nTwo."}]


def test_lines_that_begin_with_a_label_are_trecs(tmp_path):
    lines = "DESC:manner How did serfdom end ?\n\nENTY:cremat What ñ is it ?\n"
    for name, encoding in (("a.label", "latin-1"), ("b.label", "utf8"), ("train.all", "latin-1")):
        rows = read_rows(write(tmp_path / name, lines, encoding))
        assert values(rows) == [
            {"text": "How did serfdom end ?", "label": "DESC", "fine": "DESC:manner"},
            {"text": "What ñ is it ?", "label": "ENTY", "fine": "ENTY:cremat"},
        ]
        assert [row.number for row in rows] == [1, 3]
    assert values(read_rows(write(tmp_path / "c.all", "0 How ?\n"))) == [{"text": "How ?", "label": "0"}]
    with pytest.raises(DataError, match=r"c\.label, line 2: 'DESC' has no text after its label"):
        read_rows(write(tmp_path / "c.label", "DESC How ?\nDESC\n"))


def test_other_files_are_utf8_and_nothing_else(tmp_path):
    with pytest.raises(DataError, match=r"a\.tsv, line 2: byte 0xf1"):
        read_rows(write(tmp_path / "a.tsv", "text\tlabel\nñ\t1\n", "latin-1"))


def test_what_is_broken_is_named(tmp_path):
    path = write(tmp_path / "a.tsv", "a\t1\nb\n")
    with pytest.raises(DataError, match=r"row 2 \(ends on line 2\): 1 fields, but the first line has 2"):
        read_rows(path, columns={"text": "1", "label": "2"})
    with pytest.raises(DataError, match=r"names a column twice: x\n  if the file has no header, give its columns by"):
        read_rows(write(tmp_path / "b.tsv", "x\tx\nb\ta\n"))
    with pytest.raises(DataError, match="broken tab-separated record"):
        read_rows(write(tmp_path / "c.tsv", 'a\tb\n"x" y\tz\tw\n"\n'))
