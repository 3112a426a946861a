"""Captions of a folder's pictures in one file: metadata.jsonl, .csv, .parquet (as `datasets` has them), kohya's JSON.

{"file_name": "a.png", "text": "a cat"}                        a row for each picture, relative to the file's folder
{"a": {"caption": "a cat", "tags": "cat, grass"}, ...}         kohya's meta_*.json: names with or without a suffix
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ...errors import DataError, did_you_mean, listing
from ..dataset import unused_columns
from ..parse import Row
from ..read import read_rows
from .decode import SUFFIXES
from .found import CAPTION_COLUMNS

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "image")


def is_metadata(path: Path) -> bool:
    """Whether this file holds captions of the pictures beside it."""
    return path.name.lower() in NAMES or (path.suffix.lower() == ".json" and _kohya(path) is not None)


def captions_in(
    path: Path, pictures: Collection[Path], columns: Mapping[str, str], split: str | None = None
) -> tuple[dict[Path, str], dict[str, int]]:
    """Return the captions of a metadata file by picture, and notes. DataError for rows that name no picture.

    `pictures`: those there are; `columns`: {"image" or "caption": the file's name for it}.
    """
    kohya = _kohya(path) if path.suffix.lower() == ".json" else None
    if kohya is not None:
        return _of_kohya(kohya, path, pictures), {}
    return _of_rows(read_rows(path, split), path, pictures, columns)


def caption_of(row: Row, name: str | None) -> str | None:
    """Return the caption in column `name` of a row; None if it is null or blank. Raises DataError if it is no text."""
    value = row.values.get(name) if name is not None else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{row.where}: its {name} is a {type(value).__name__}; expected the caption as text\n"
            "  name the column that holds it: --columns caption=NAME"
        )
    return " ".join(value.split()) or None


def caption_column(names: Iterable[str], columns: Mapping[str, str], where: str) -> str | None:
    """Return the column with captions: the one given, or the first of text, caption, prompt; None if there is none."""
    return _column(list(names), columns, "caption", CAPTION_COLUMNS, where)


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise DataError for a name in `columns` that pictures do not have."""
    for name in columns:
        if name not in ("image", "caption"):
            raise DataError(
                f"columns: '{name}' is not a column of pictures{did_you_mean(name, ('image', 'caption'))}\n"
                "  expected image=NAME, caption=NAME or both"
            )


def _column(
    names: list[str], columns: Mapping[str, str], ours: str, candidates: Iterable[str], where: str
) -> str | None:
    theirs = columns.get(ours)
    if theirs is None:
        return next((name for name in candidates if name in names), None)
    if theirs not in names:
        raise DataError(
            f"{where}: no column '{theirs}' (columns: {ours}: {theirs}){did_you_mean(theirs, names)}\n"
            f"  columns: {listing(names, 20)}"
        )
    return theirs


def _of_rows(
    rows: list[Row], path: Path, pictures: Collection[Path], columns: Mapping[str, str]
) -> tuple[dict[Path, str], dict[str, int]]:
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    file_column = _column(names, columns, "image", FILE_COLUMNS, str(path))
    column = caption_column(names, columns, str(path))
    if file_column is None:
        raise DataError(
            f"{path}: no column file_name, which names each row's picture; columns: {listing(names, 20)}\n"
            "  name the column that does: --columns image=NAME"
        )
    found: dict[Path, str] = {}
    for row in rows:
        name = row.values.get(file_column)
        if not isinstance(name, str) or not name:
            raise DataError(f"{row.where}: its {file_column} is {name!r}; expected a picture's file name")
        picture = path.parent / name
        if picture not in pictures:
            hint = did_you_mean(name, (str(p.relative_to(path.parent)) for p in pictures if _is_in(p, path.parent)))
            raise DataError(f"{row.where}: there is no picture '{name}' in {path.parent}{hint}")
        caption = caption_of(row, column)
        if caption is not None:
            found[picture] = caption
    return found, unused_columns([[name for name in row.values if name not in (file_column, column)] for row in rows])


def _kohya(path: Path) -> dict[str, dict[str, object]] | None:
    """Return the content of kohya's metadata file; None if the file is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not content:
        return None
    fits = all(isinstance(entry, dict) and ("caption" in entry or "tags" in entry) for entry in content.values())
    return content if fits else None


def _of_kohya(content: Mapping[str, Mapping[str, object]], path: Path, pictures: Collection[Path]) -> dict[Path, str]:
    """Caption and tags, joined by a comma as kohya's trainer does. Its keys are paths, or names without a suffix."""
    by_key: dict[str, Path] = {}
    for picture in pictures:
        if _is_in(picture, path.parent):
            relative = picture.relative_to(path.parent)
            for key in (picture.stem, picture.name, str(relative.with_suffix("")), str(relative)):
                by_key[key] = picture
    found: dict[Path, str] = {}
    for key, entry in content.items():
        name = Path(key.replace("\\", "/"))
        stem = name.with_suffix("") if name.suffix.lower() in SUFFIXES else name
        at = next((by_key[k] for k in (key, str(name), str(stem), name.name, stem.name) if k in by_key), None)
        if at is None:
            raise DataError(f"{path}: there is no picture '{key}' in {path.parent}{did_you_mean(stem.name, by_key)}")
        parts = [" ".join(str(entry[part]).split()) for part in ("caption", "tags") if entry.get(part)]
        if any(parts):
            found[at] = ", ".join(part for part in parts if part)
    return found


def _is_in(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder)
