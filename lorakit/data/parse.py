"""Parse the text formats: each function takes a file's text and yields its rows, or says where the file is broken.

JSONL (one object per line), JSON (a list of objects, or an object that contains one) and prose; `tables.py` has those
of tables. Files are UTF-8, with or without a byte order mark; other encodings are an error, never guessed.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.errors import DataError, listing

DOCUMENT_END = "<|endoftext|>"

# UTF-32 first: its little-endian mark starts with UTF-16's.
FOREIGN_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Row:
    """One record and where it came from. `number`: the line in JSONL, otherwise the record, counted from 1."""

    values: dict[str, Any]
    file: str
    number: int

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


def decode(raw: bytes, file: str) -> str:
    """Decode a UTF-8 file and strip its byte order mark. Raises DataError for another encoding or broken bytes."""
    for mark, encoding in FOREIGN_MARKS.items():
        if raw.startswith(mark):
            raise DataError(
                f"{file}: this is {encoding} (by its byte order mark); UTF-8 is expected\n"
                f"  convert it: iconv -f {encoding} -t UTF-8 OLD > NEW"
            )
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8, the expected "
            "encoding\n"
            f"  if the file is in another encoding, convert it: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
        ) from error


def jsonl(text: str, file: str, start: int = 1) -> Iterator[Row]:
    """Yield one row per line, each a JSON object; skip blank lines. `start`: the first line's number. DataError."""
    # Not splitlines(): a JSON string may contain an unescaped U+2028 or U+0085.
    for number, line in enumerate(text.split("\n"), start=start):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "\n  the file looks like one JSON document: name it .json" if line.strip() in ("[", "{") else ""
            raise DataError(f"{file}, row {number}, column {error.colno}: broken JSON: {error.msg}{hint}") from error
        if isinstance(values, list) and number == 1:
            raise DataError(
                f"{file}, row 1: a list where an object is expected\n"
                "  the file looks like one JSON document: name it .json"
            )
        yield Row(_object(values, file, number), file, number)


def json_document(text: str, file: str, split: str | None = None) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of the one list inside an object; `split` picks among several lists.

    Raises DataError.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        # JSON Lines named .json is common. json reports it as "Extra data" after the first line's object.
        if error.msg == "Extra data" and error.lineno > 1 and text.lstrip().startswith("{"):
            yield from jsonl(text, file)
            return
        raise DataError(f"{file}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from error
    records = document if isinstance(document, list) else _only_list(document, file, split)
    for number, values in enumerate(records, start=1):
        yield Row(_object(values, file, number), file, number)


def prose(text: str, file: str) -> Iterator[Row]:
    """Yield documents as column `text`: the file split at `<|endoftext|>`, or the entire file as one document."""
    documents = [part.strip() for part in text.split(DOCUMENT_END)] if DOCUMENT_END in text else [text.strip("\r\n")]
    for number, document in enumerate((d for d in documents if d.strip()), start=1):
        yield Row({"text": document}, file, number)


def _object(values: object, file: str, number: int) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(
            f"{file}, row {number}: {_kind(values)} where an object is expected\n"
            '  each row is an object such as {"prompt": "...", "completion": "..."}'
        )
    return values


def _only_list(document: object, file: str, split: str | None) -> list[Any]:
    """Return the list of records inside a JSON object."""
    if not isinstance(document, dict):
        raise DataError(f"{file}: {_kind(document)} where a list of objects is expected")
    lists = {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and all(isinstance(v, dict) for v in value)
    }
    if split in lists:
        return lists[split]
    if len(lists) == 1:
        return next(iter(lists.values()))
    contents = (
        f"it contains several: {listing(lists)}; name one of them as the split"
        if lists
        else f"its keys are: {listing(document)}"
    )
    raise DataError(f"{file}: a list of objects is expected, or an object that contains one; {contents}")


def _kind(value: object) -> str:
    names = {
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
