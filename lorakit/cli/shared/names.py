"""Check names of models and data before torch is imported: a mistyped one is an error at once, also when offline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...bases.hub_reach import check_hub

_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".label", ".all", ".gz")


def check_names(model: str | None = None, data: str | None = None, adapters: Iterable[str] = ()) -> None:
    """Raise LorakitError for a name that is neither here nor in the cache while the hub is out of reach.

    `adapters`: as in --adapter, PATH or NAME=PATH.
    """
    from ...bases.load import EMBEDDED, EXPECTED

    if model is not None and model != EMBEDDED and model.count("/") <= 1:
        check_hub(model, EXPECTED)
    if data is not None and data.count("/") <= 1 and Path(data).suffix not in _DATA_FILES:
        check_hub(data, "a file, a folder, or a dataset on the hub", "datasets")
    for adapter in adapters:
        name = adapter.partition("=")[2] or adapter
        if "/" in name:  # without one it is no hub id of an adapter
            check_hub(name, "an adapter's folder or file, or a hub id")
