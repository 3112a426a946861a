"""Data sets with a column of pictures: Parquet, Arrow, a folder of these, or one on the hub, through `datasets`.

The pictures stay where they are (a memory-mapped file) until they are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, did_you_mean, listing
from ..arrow import is_arrow
from ..dataset import unused_columns
from ..parse import Row
from ..read import HUB_ID
from .found import Found, Source
from .metadata import caption_column, caption_of, check_columns

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")


def read_dataset(source: str, split: str | None = None, columns: Mapping[str, str] | None = None) -> Source:
    """Return the rows of a data set as pictures. Raises DataError if it has no column of pictures."""
    columns = columns or {}
    check_columns(columns)
    rest, pictures = picture_rows(source, split, columns)
    column = caption_column(rest.column_names, columns, source)
    found = [
        replace(picture, caption=caption_of(Row(dict(values), source, number), column))
        for number, (picture, values) in enumerate(zip(pictures, rest, strict=True), start=1)
    ]
    notes = unused_columns([[name for name in rest.column_names if name != column]] * len(found))
    expected = f"text in the column {column}" if column else "a column text or caption (--columns caption=NAME)"
    return Source(source, found, notes, expected)


def picture_rows(source: str, split: str | None, columns: Mapping[str, str]) -> tuple[Dataset, list[Found]]:
    """Return a data set's columns besides the pictures, and its pictures in the same order, without captions.

    Raises DataError if it has no column of pictures, or no rows.
    """
    data = _loaded(source, split or "train", split is not None)
    image = _image_column(data, columns, source)
    import datasets

    stored = data.cast_column(image, datasets.Image(decode=False))
    if not len(stored):
        raise DataError(f"{source}: no rows")
    found = []
    for number in range(1, len(stored) + 1):
        where = Row({}, source, number).where
        found.append(Found(where, "", f"row {number}", partial(_bytes, stored, image, number - 1, where), None))
    return stored.remove_columns([image]), found


def has_image_column(source: str, split: str | None = None) -> bool:
    """Whether a data set has a column of pictures. False for a source that `datasets` cannot read."""
    try:
        names = _features(source, split)
    # datasets lets all errors through (HTTP, parsing, scripts); who reads the source next says what is wrong with it.
    except Exception:
        return False
    return bool(names)


def _bytes(data: Dataset, column: str, index: int, where: str) -> bytes:
    value = data[index][column]
    if value is None:
        raise DataError(f"{where}: its {column} is null")
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    return Path(value["path"]).read_bytes()


def _loaded(source: str, split: str, asked: bool) -> Dataset:
    import datasets

    path = Path(source).expanduser()
    try:
        if is_arrow(path):
            data: Any = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
        elif path.exists():
            data = datasets.load_dataset("parquet", data_files=_parquet_files(path, split if asked else None))
            return data["train"]
        else:
            hub = HUB_ID.fullmatch(source)
            if hub is None:
                raise DataError(f"{source}: no such file or folder")
            data = datasets.load_dataset(hub["id"], hub["config"])
    except DataError:
        raise
    # datasets lets all errors through (HTTP, parsing, scripts): any of them means that the source cannot be read.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source}: not a data set of pictures that datasets can read: {reason}\n"
            "  expected a folder of pictures, a Parquet or Arrow file with a column of pictures, or a hub id"
        ) from error
    if isinstance(data, datasets.Dataset):
        return data
    name = split if split in data or asked else next(iter(data)) if len(data) == 1 else split
    if name not in data:
        raise DataError(
            f"{source}: no split '{name}'{did_you_mean(name, data)}\n  give one of them as the split: {listing(data)}"
        )
    return data[name]


def _parquet_files(path: Path, split: str | None) -> list[str]:
    if path.is_file():
        return [str(path)]
    files = sorted(str(file) for file in path.rglob("*.parquet") if not file.name.startswith("."))
    subset = split or ("train" if any("train" in Path(file).name.lower() for file in files) else "")
    chosen = [file for file in files if subset.lower() in Path(file).name.lower()]
    if not chosen:
        raise DataError(f"{path}: no Parquet file{f' for split {split!r} among: {listing(files)}' if files else ''}")
    return chosen


def _features(source: str, split: str | None) -> list[str]:
    """The columns of pictures, without reading rows."""
    import datasets

    path = Path(source).expanduser()
    if path.exists() and not is_arrow(path):
        from pyarrow import parquet

        schema = parquet.read_schema(_parquet_files(path, split)[0])
        return _image_columns(datasets.Features.from_arrow_schema(schema))
    if path.exists():
        return _image_columns(_loaded(source, split or "train", split is not None).features)
    hub = HUB_ID.fullmatch(source)
    if hub is None:
        return []
    return _image_columns(datasets.load_dataset_builder(hub["id"], hub["config"]).info.features or {})


def _image_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns of pictures: marked as such, or {bytes, path}, which is how pictures are stored."""
    import datasets

    def is_picture(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    return [name for name, feature in features.items() if is_picture(feature)]


def _image_column(data: Dataset, columns: Mapping[str, str], source: str) -> str:
    given = columns.get("image")
    if given is not None:
        if given not in data.column_names:
            raise DataError(
                f"{source}: no column '{given}' (columns: image: {given}){did_you_mean(given, data.column_names)}\n"
                f"  columns: {listing(data.column_names, 20)}"
            )
        return given
    names = _image_columns(data.features)
    preferred = [name for name in IMAGE_COLUMNS if name in names]
    if len(names) == 1 or preferred:
        return (preferred or names)[0]
    what = f"several columns of pictures, {listing(names)}" if names else "no column of pictures"
    raise DataError(
        f"{source}: {what}; columns: {listing(data.column_names, 20)}\n  name the one to use: --columns image=NAME"
    )
