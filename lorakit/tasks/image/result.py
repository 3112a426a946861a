"""A picture run's result: one file that image programs read, and what is ours beside it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AdapterError, listing
from ...export.widest import widest_format
from ...formats import format_named
from ...formats import losses as lost_in
from ...formats.inside import FILE_KEY, OURS
from ...io.atomic import write_text

if TYPE_CHECKING:
    from ...adapter.adapter import Adapter

AUTO = "auto"


def unsaved(adapter: Adapter, save_as: str) -> str | None:
    """Say what the format that is written cannot hold of the adapter; None if it holds all of it. `save_as`: the run's
    setting.
    """
    format = _format_for(adapter, save_as)
    lost = lost_in(adapter, format)
    return "\n  ".join([f"save_as: {format} cannot hold what this run trains:", *lost]) if lost else None


def write(adapter: Adapter, folder: Path, save_as: str, name: str) -> None:
    """Write an adapter into a folder. The file is read again: AdapterError if a module or a word is not in it.

    `name`: the file's, in formats without a name of their own for it; programs show it and link it by.
    """
    from ...adapter.adapter import Adapter

    format = _format_for(adapter, save_as)
    own = format_named(format).files
    file = folder / (own[0] if own else f"{name}.safetensors")
    written = Adapter.load(adapter.save(file, format))
    lost = {*adapter.updates, *adapter.embeddings} - {*written.updates, *written.embeddings}
    if lost:
        raise AdapterError(f"{folder}: {len(lost)} modules are not in the file that was written: {listing(lost, 3)}")
    placed = Counter(module.partition(".")[0] for module in written.updates)
    ours = {**adapter.metadata, "placed": dict(sorted(placed.items())), FILE_KEY: file.name}
    write_text(folder / OURS, json.dumps(ours, indent=2, sort_keys=True) + "\n")


def _format_for(adapter: Adapter, save_as: str) -> str:
    """Return the format to write. "auto" is the one that most image programs read."""
    return widest_format(adapter) if save_as == AUTO else save_as
