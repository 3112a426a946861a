"""Read rows from a data file, a folder of data files, or a dataset on the Hugging Face hub.

The suffix decides the file type (.jsonl, .json, .csv, .tsv, .parquet, .txt, TREC's .label and .all; all but Parquet
also as .gz, .xz or .bz2). A .txt file is prose, or a table if columns are named and its first line has tabs.
A path that does not exist and reads OWNER/NAME (or OWNER/NAME:CONFIG, or NAME) is taken for a hub id.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data import parse, tables
from lorakit.data.arrow import arrow_rows, is_arrow
from lorakit.data.parse import Row
from lorakit.errors import DataError, did_you_mean, listing, not_the_file

# Lines of a label and a text, as TREC's files (.label) and their copies by coarse class (.all) have them.
LABELLED_LINES = (".label", ".all")
TEXT_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", *LABELLED_LINES)
TYPES = (*TEXT_TYPES, ".parquet")
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
ACCEPTED = "accepted: .jsonl, .json, .csv, .tsv, .txt, .label (each also as .gz, .xz, .bz2) and .parquet"

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
TRAIN_NAMES = ("train",)
OTHER_NAMES = ("test", "valid", "val", "dev", "eval")


def read_rows(
    source: str | Path, split: str | None = None, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Return at least one and at most `limit` rows of `source`.

    `split` picks the files of a folder whose names contain it, one of several lists in a JSON file, or the split of a
    hub dataset (default "train"). Other files ignore it. `columns` (a task's name -> the file's) decides how tables are
    read: with numbers, from 1, a table has no header. Raises DataError.
    """
    rows = list(islice(_rows(source, split, limit, partial(_file, columns=columns)), limit))
    if not rows:
        raise DataError(f"{source}: no rows; the file is empty or has only a header or blank lines")
    return rows


def stream_rows(
    source: str | Path, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Yield the rows of `source` one by one, as `read_rows` returns them.

    JSONL, Parquet, Arrow and hub data sets are never in memory as a whole; files of other types are, one at a time.
    """
    empty = True
    for row in _rows(source, split, None, partial(_streamed, columns=columns)):
        empty = False
        yield row
    if empty:
        raise DataError(f"{source}: no rows; the file is empty or has only a header or blank lines")


def _rows(
    source: str | Path, split: str | None, limit: int | None, read: Callable[..., Iterator[Row]]
) -> Iterator[Row]:
    path = Path(source).expanduser()
    if is_arrow(path):
        return (Row(_without_filler(row.values), row.file, row.number) for row in arrow_rows(path, split))
    if path.is_dir():
        return (row for file in _files_of(path, split) for row in read(file, split, limit))
    return read(path, split, limit) if path.exists() else _hub(str(source), path, split, limit)


def _streamed(
    path: Path, split: str | None, limit: int | None, columns: Mapping[str, str] | None = None
) -> Iterator[Row]:
    file_type, compression = _file_type(path)
    if file_type not in (".jsonl", ".ndjson") or not_the_file(path) is not None:
        return _file(path, split, limit, columns)
    return _lines(path, compression)


def _lines(path: Path, compression: str) -> Iterator[Row]:
    try:
        with (OPENERS[compression] if compression else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield from parse.jsonl(parse.decode(line, f"{path}, row {number}"), str(path), number)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cannot be read to its end: {error}") from error


def _file(path: Path, split: str | None, limit: int | None, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    file_type, compression = _file_type(path)
    if not file_type:
        suffix = path.suffix or path.name
        raise DataError(f"{path}: unknown file type '{suffix}'{did_you_mean(suffix, TYPES)}\n  {ACCEPTED}")
    problem = not_the_file(path) if file_type != ".txt" else None  # prose may begin with anything
    if problem is not None:
        raise DataError(problem)
    if file_type == ".parquet":
        return _parquet(path, limit)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if compression:
        try:
            raw = COMPRESSIONS[compression](raw)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise DataError(f"{path}: broken or incomplete {compression} file: {error}") from error
    text = _decoded(raw, path, file_type)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if file_type in (".jsonl", ".ndjson"):
        return parse.jsonl(text, str(path))
    if file_type == ".json":
        return parse.json_document(text, str(path), split)
    if file_type in LABELLED_LINES:
        return tables.labelled_lines(text, str(path))
    if file_type == ".txt" and not (columns and "\t" in text.partition("\n")[0]):
        return parse.prose(text, str(path))
    return tables.table(text, str(path), "," if file_type == ".csv" else "\t", tables.is_numbered(columns))


def _decoded(raw: bytes, path: Path, file_type: str) -> str:
    if file_type in LABELLED_LINES:  # TREC's own files are in Latin-1, in which any byte is a character
        try:
            return parse.decode(raw, str(path))
        except DataError:
            return raw.decode("latin-1")
    return parse.decode(raw, str(path))


def _file_type(path: Path) -> tuple[str, str]:
    """Return the data suffix and the compression suffix, each "" if unknown."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    types = TEXT_TYPES if compression else TYPES
    return next((suffix for suffix in types if name.endswith(suffix)), ""), compression


def _parquet(path: Path, limit: int | None) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=min(limit or 8192, 8192)):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(_without_filler(values), str(path), number)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _files_of(folder: Path, split: str | None) -> list[Path]:
    """Return the data files of a folder, sorted by name; skip hidden files and unknown types."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".") and _file_type(f)[0])
    if not files:
        contents = listing(sorted(f.name for f in folder.iterdir())) or "nothing"
        raise DataError(f"{folder}: no data files in this folder; it contains: {contents}\n  {ACCEPTED}")
    if split is not None:
        chosen = [f for f in files if split.lower() in f.name.lower()]
        if not chosen:
            raise DataError(f"{folder}: no file for split '{split}' among: {listing(f.name for f in files)}")
        return chosen
    names = [f.name.lower() for f in files]
    train = [n for n in names if any(word in n for word in TRAIN_NAMES)]
    others = [n for n in names if n not in train and any(word in n for word in OTHER_NAMES)]
    if train and others:
        raise DataError(
            f"{folder}: files of several splits ({listing([*train, *others])}); reading all would train on the test "
            "rows\n"
            "  give the split, for example train, or name one file"
        )
    return files


def _hub(name: str, path: Path, split: str | None, limit: int | None) -> Iterator[Row]:
    hub_id = HUB_ID.fullmatch(name)
    if not hub_id or _file_type(path)[0]:
        raise DataError(f"{name}: no such file or folder{_neighbour(path)}")
    from datasets import load_dataset

    chosen = split or "train"
    try:
        data = load_dataset(hub_id["id"], hub_id["config"], split=f"{chosen}[:{limit}]" if limit else chosen)
    # load_dataset lets all errors through (HTTP, parsing, scripts): any of them means the source cannot be read.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: no such file or folder{_neighbour(path)}; "
            f"tried as a dataset on the hub (split {chosen}): {reason}\n"
            "  name an existing file or folder, or a hub dataset as OWNER/NAME or OWNER/NAME:CONFIG"
        ) from error
    return (
        Row(_without_filler(dict(values)), f"{name} ({chosen})", number) for number, values in enumerate(data, start=1)
    )


def _without_filler(values: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the nulls inside its columns.

    Arrow gives all objects of a column the same keys, and fills in nulls: without this, each call of a tool would have
    the arguments of all the others.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(each) for key, each in value.items() if each is not None}
        return [kept(each) for each in value] if isinstance(value, list) else value

    return {name: kept(value) for name, value in values.items()}


def _neighbour(path: Path) -> str:
    """Suggest the most similar name beside `path`, or say that its folder is missing too."""
    folder = path.parent
    if not folder.is_dir():
        return f" (nor is there a folder {folder})"
    return did_you_mean(path.name, (f.name for f in folder.iterdir()))
