"""Find the pictures of a source: a folder of files, a metadata file, or a data set with a column of pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path

from ...errors import DataError, LorakitError
from ..arrow import is_arrow
from ..read import OTHER_NAMES, stream_rows
from .decode import SUFFIXES, UNREADABLE
from .folder import pictures_below, read_folder
from .found import Source
from .metadata import FILE_COLUMNS, is_metadata
from .rows import has_image_column, read_dataset

_TABLES = (".parquet", ".arrow")
_METADATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def find(
    source: str | Path,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    leave_out: Collection[Path] = (),
) -> Source:
    """Return a source's pictures with their captions. `leave_out`: folders in it that hold something else.

    `split`: a folder in a folder of pictures, or a split of a data set. Raises DataError.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not is_arrow(path):
        folder = split_folder(path, split, leave_out)
        if pictures_below(folder, leave_out) or not any(path.rglob("*.parquet")):
            return read_folder(folder, columns, leave_out)
    elif path.is_file() and path.suffix.lower() in (*SUFFIXES, *UNREADABLE):
        raise DataError(f"{path} is one picture\n  give the folder it is in")
    elif path.is_file() and (path.suffix not in _TABLES or not has_image_column(str(path), split)):
        return read_folder(path.parent, columns, leave_out, metadata=path)
    return read_dataset(str(source), split, columns)


def is_pictures(source: str | Path, split: str | None = None) -> bool:
    """Whether a source is pictures rather than text. False where it cannot be read, which reading it will say."""
    path = Path(source).expanduser()
    if path.is_dir() and not is_arrow(path):
        tables = [f for f in path.iterdir() if f.suffix.lower() in (*_METADATA, *_TABLES) and not is_metadata(f)]
        if pictures_below(path):  # beside rows of text they are illustrations, unless the rows name them
            return not tables or any(is_pictures(table) for table in tables)
        return any(path.rglob("*.parquet")) and has_image_column(str(path), split)
    if path.is_file() and path.suffix.lower() in _METADATA:
        try:
            first = next(islice(stream_rows(path, split), 1), None)
        except LorakitError:
            return False
        names = [first.values.get(column) for column in FILE_COLUMNS] if first is not None else []
        return any(isinstance(name, str) and name.lower().endswith(SUFFIXES) for name in names)
    if path.is_file():
        return path.suffix in _TABLES and has_image_column(str(path), split)
    if path.suffix.lower() in (*_METADATA, *_TABLES, ".txt", ".gz", ".xz", ".bz2"):
        return False  # a file that is not there, rather than a hub id
    return has_image_column(str(source), split)


def split_folder(folder: Path, split: str | None, leave_out: Collection[Path] = ()) -> Path:
    """Return the folder of a split: train, test, ... as `datasets` reads a folder of pictures. Raises DataError."""
    away = {path.resolve() for path in leave_out}
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.resolve() not in away)
    others = [name for name in names if name.lower() in (*OTHER_NAMES, "validation")]
    if split is not None and pictures_below(folder, leave_out):
        if split not in names:
            raise DataError(f"{folder}: no folder for split '{split}'; folders: {', '.join(names) or 'none'}")
        return folder / split
    if split is None and "train" in names and others:
        raise DataError(
            f"{folder}: folders of several splits (train, {', '.join(others)}); reading all would train on the test "
            "pictures\n  give the split: --split train"
        )
    return folder
