"""Parse tables: comma- or tab-separated lines with a header or numbered columns, and lines that begin with a label.

Tab-separated files come in two kinds. Spreadsheets and pandas quote a field that contains quotes or tabs; GLUE's files
(SST-2, CoLA, MRPC, RTE, STS-B) quote nothing, and a quote is a character like others. A file is read as unquoted if as
quoted it is broken, or a quoted field would span lines, while every line has the same number of fields.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import DataError, listing
from .parse import Row

SEPARATORS = {",": "comma", "\t": "tab"}


def is_numbered(columns: Mapping[str, str] | None) -> bool:
    """Whether columns (our name -> the file's) are given by number, from 1: those of a table without a header."""
    return bool(columns) and all(str(name).isdecimal() for name in (columns or {}).values())


def table(text: str, file: str, delimiter: str, numbered: bool = False) -> Iterator[Row]:
    """Yield the records of a table. Raises DataError, also for a wrong number of fields.

    numbered: there is no header, and the columns are called "1", "2", ...
    """
    records = _records(text, file, delimiter)
    if not records:
        return
    header = [str(place) for place, _ in enumerate(records[0][0], start=1)] if numbered else records[0][0]
    what = f"the {'first line' if numbered else 'header'} has {len(header)}"
    if not numbered:
        _check_header(header, file, delimiter)
    for number, (fields, line) in enumerate(records if numbered else records[1:], start=1):
        if len(fields) != len(header):
            raise DataError(
                f"{file}, row {number} (ends on line {line}): {len(fields)} fields, but {what}: {listing(header)}\n"
                "  quote fields that contain separators or newlines"
            )
        yield Row(dict(zip(header, fields)), file, number)


def _check_header(header: list[str], file: str, delimiter: str) -> None:
    other = next((mark for mark in (";", "\t", ",") if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other:
        raise DataError(
            f"{file}, line 1: fields are expected to be separated by {SEPARATORS[delimiter]}s, but the header is "
            f"{header[0]!r}"
        )
    if len(set(header)) < len(header):
        repeated = [name for name in dict.fromkeys(header) if header.count(name) > 1]
        raise DataError(
            f"{file}, line 1: the header names a column twice: {listing(repeated)}\n"
            "  if the file has no header, give its columns by number: columns: {text: 1, label: 2}"
        )


def _records(text: str, file: str, delimiter: str) -> list[tuple[list[str], int]]:
    """Return each record's fields and the line it ends on."""
    error: DataError | None = None
    quoted: list[tuple[list[str], int]] = []
    try:
        quoted = _quoted(text, file, delimiter)
    except DataError as raised:
        error = raised
    if delimiter == "\t" and '"' in text:
        lines = [(line.removesuffix("\r"), number) for number, line in enumerate(text.split("\n"), start=1)]
        plain = [(line.split("\t"), number) for line, number in lines if line]
        even = len({len(fields) for fields, _ in plain}) == 1 and len(plain[0][0]) > 1
        if even and (error is not None or len(quoted) != len(plain)):
            return plain
    if error is not None:
        raise error
    return quoted


def _quoted(text: str, file: str, delimiter: str) -> list[tuple[list[str], int]]:
    # csv's default limit, 131,072 characters a field, is too small for long documents. Process-wide, so restored below.
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(fields, reader.line_num) for fields in reader if fields]
    except csv.Error as error:
        raise DataError(
            f"{file}, line {reader.line_num}: broken {SEPARATORS[delimiter]}-separated record: {error}\n"
            '  quote a field that contains quotes, separators or newlines, and double quotes inside it: "say ""hi"""'
        ) from error
    finally:
        csv.field_size_limit(limit)


def labelled_lines(text: str, file: str) -> Iterator[Row]:
    """Yield the rows of TREC's question files (Li and Roth 2002): a label, a space, and the question on each line.

        DESC:manner How did serfdom develop in and then leave Russia ?

    `label` is the coarse class DESC, `fine` is DESC:manner; without a colon there is only `label`. DataError for a line
    without a text.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        label, _, question = line.strip().partition(" ")
        if not question.strip():
            raise DataError(
                f"{file}, line {number}: {line.strip()!r} has no text after its label\n"
                "  expected a label, a space and a text, as in TREC's question files"
            )
        coarse, colon, _ = label.partition(":")
        values: dict[str, Any] = {"text": question.strip(), "label": coarse}
        yield Row(values | ({"fine": label} if colon else {}), file, number)
