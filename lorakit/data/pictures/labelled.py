"""Pictures with a label each: a folder of folders named by label, or rows with the columns `image` and `label`.

    pets/cat/1.png   pets/dog/7.png                          the label is the folder's name (torchvision's ImageFolder)
    pets/rows.jsonl  {"image": "1.png", "label": "cat"}      the picture's path is relative to the file's folder
    Parquet, Arrow, or a hub id                              a column of pictures, and one of labels

A label is a word or a whole number. A column of `datasets.ClassLabel` has its names, in the order of its ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError, did_you_mean, listing
from ..arrow import is_arrow
from ..dataset import unused_columns
from ..parse import Row
from ..read import read_rows
from .decode import SUFFIXES, UNREADABLE
from .find import split_folder
from .folder import pictures_below
from .found import Found, Source
from .metadata import FILE_COLUMNS
from .rows import has_image_column, picture_rows

COLUMNS = ("image", "label")
_EXPECTED = (
    "a folder of folders named by label, a file of rows with image and label (.jsonl, .csv, ...), or a data set with a "
    "column of pictures"
)


@dataclass(frozen=True)
class LabelledSource:
    """The pictures of a source and their labels, None where a row has none. `rows`: those that name the pictures, None
    for files in folders; `names`: of all labels, where the source says in which order; empty if it does not.
    """

    source: Source
    labels: list[str | None]
    rows: list[Row | None]
    names: list[str] = field(default_factory=list)


def find_labelled(
    source: str | Path, split: str | None = None, columns: Mapping[str, str] | None = None, needed: bool = True
) -> LabelledSource:
    """Return a source's pictures with their labels. Raises DataError for a row that has none.

    `split`: a folder in a folder of pictures, or a split of a data set; `columns`: {"image" or "label": the source's
    name for it}; `needed`: whether each picture must have a label.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in COLUMNS:
            raise DataError(
                f"columns: '{name}' is not a column of labelled pictures{did_you_mean(name, COLUMNS)}\n"
                "  expected image=NAME, label=NAME or both"
            )
    path = Path(source).expanduser()
    if path.is_dir() and not is_arrow(path):
        if pictures_below(path):
            return _of_folder(split_folder(path, split), needed)
        if any(path.rglob("*.parquet")):
            return _of_dataset(str(source), split, columns, needed)
        raise DataError(f"{path}: no pictures in this folder\n  expected {_EXPECTED}")
    if path.is_file() and path.suffix.lower() in (*SUFFIXES, *UNREADABLE):
        raise DataError(f"{path} is one picture\n  expected {_EXPECTED}")
    if path.is_file() and not (path.suffix == ".parquet" and has_image_column(str(path), split)):
        return _of_rows(read_rows(path, split), path, columns, needed)
    return _of_dataset(str(source), split, columns, needed)


def is_labelled_picture(row: Mapping[str, Any]) -> bool:
    """Whether a row of data is a picture's path, or its bytes, with a label."""
    image = row.get("image")
    of_picture = isinstance(image, str) and image.lower().endswith(SUFFIXES)
    stored = isinstance(image, Mapping) and {"bytes", "path"} <= image.keys()
    return (of_picture or stored) and isinstance(row.get("label"), str | int)


def _of_folder(folder: Path, needed: bool) -> LabelledSource:
    pictures = pictures_below(folder)
    outside = [path.name for path in pictures if path.parent == folder]
    tables = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".jsonl", ".csv", ".tsv"))
    if outside and needed:
        hint = (
            f"give the file that names them: {folder / tables[0]}"
            if tables
            else "expected folders named by label, such as cat/1.png, or rows with image and label (.jsonl, .csv)"
        )
        raise DataError(f"{folder}: pictures that are in no folder named by their label: {listing(outside)}\n  {hint}")
    found, labels = [], []
    for path in pictures:
        inside = path.relative_to(folder)
        parent = "" if inside.parent == Path() else str(inside.parent)
        found.append(Found(str(path), parent, str(inside.with_suffix("")), path.read_bytes, None, path))
        labels.append(inside.parts[0] if parent else None)
    notes = {f"{name} is not read: the folders' names are the labels; give the file to read it": 1 for name in tables}
    return LabelledSource(Source(str(folder), found, notes), labels, [None] * len(found))


def _of_rows(rows: list[Row], path: Path, columns: Mapping[str, str], needed: bool) -> LabelledSource:
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    image = _column("image", names, columns, ("image", *FILE_COLUMNS), str(path), True)
    label = _column("label", names, columns, ("label",), str(path), needed)
    found: list[Found] = []
    for row in rows:
        name = row.values.get(image) if image is not None else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{row.where}: its {image} is {name!r}; expected a picture's file name")
        picture = Path(name) if Path(name).is_absolute() else path.parent / name
        if not picture.is_file():
            siblings = [p.name for p in picture.parent.iterdir()] if picture.parent.is_dir() else []
            raise DataError(f"{row.where}: there is no picture '{name}' in {path.parent}{did_you_mean(name, siblings)}")
        found.append(Found(f"{row.where}: {name}", "", str(Path(name).with_suffix("")), picture.read_bytes, None))
    labels = [_label(row.where, row.values.get(label) if label is not None else None, needed) for row in rows]
    unread = [
        [name for name, value in row.values.items() if value is not None and name not in (image, label)] for row in rows
    ]
    return LabelledSource(Source(str(path), found, unused_columns(unread)), labels, [*rows])


def _of_dataset(source: str, split: str | None, columns: Mapping[str, str], needed: bool) -> LabelledSource:
    rest, found = picture_rows(source, split, columns)
    column = _column("label", rest.column_names, columns, ("label",), source, needed)
    names = list(getattr(rest.features[column], "names", None) or []) if column is not None else []
    labels: list[str | None] = []
    for picture, values in zip(found, rest if column is not None else [{}] * len(found), strict=True):
        value = values.get(column)
        if names and isinstance(value, int):
            value = names[value] if 0 <= value < len(names) else None  # -1: a test set without labels
        labels.append(_label(picture.where, value, needed))
    unread = [[name for name in rest.column_names if name != column]] * len(found)
    rows: list[Row | None] = [Row(dict(values), source, number) for number, values in enumerate(rest, start=1)]
    return LabelledSource(Source(source, found, unused_columns(unread)), labels, rows, names)


def _column(
    ours: str, names: list[str], columns: Mapping[str, str], candidates: tuple[str, ...], where: str, needed: bool
) -> str | None:
    given = columns.get(ours)
    if given is not None and given not in names:
        raise DataError(f"{where}: no column '{given}' (columns: {ours}: {given}){did_you_mean(given, names)}")
    found = given or next((name for name in candidates if name in names), None)
    if found is None and needed:
        raise DataError(
            f"{where}: no column {ours}; columns found: {listing(names, 20) or 'none'}\n"
            f"  expected image and label; or say which column it is: columns: {{{ours}: ...}}"
        )
    return found


def _label(where: str, value: Any, needed: bool) -> str | None:
    if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
        return str(value).strip()
    if value is None and not needed:
        return None
    raise DataError(f"{where}: its label is {value!r}; expected a word or a whole number")
