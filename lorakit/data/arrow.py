"""Data sets that `datasets` saved as Arrow on disk (`save_to_disk`): a folder, or one of its .arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorakit.data.parse import Row
from lorakit.errors import DataError, did_you_mean, listing

# What `save_to_disk` writes beside the rows, for one data set and for several splits.
_MARKS = ("state.json", "dataset_dict.json")


def is_arrow(path: Path) -> bool:
    """Whether this is such a folder or file."""
    return any((path / mark).is_file() for mark in _MARKS) if path.is_dir() else path.suffix == ".arrow"


def arrow_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Yield the rows, which stay on disk. `split`: one of several. Raises DataError."""
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path))
    # load_from_disk and from_file let all errors through (pyarrow's, JSON's): any of them means it cannot be read.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a data set that datasets can read: {first}") from error
    if isinstance(data, DatasetDict):
        name = split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else None)
        if name not in data:
            raise DataError(
                f"{path}: {'no split ' + repr(name) if name else 'it has several splits'}"
                f"{did_you_mean(name or '', data)}\n  give one of them as the split: {listing(data)}"
            )
        data = data[name]
    for number, values in enumerate(data, start=1):
        yield Row(dict(values), str(path), number)
