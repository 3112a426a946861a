"""Whether a checkpoint is the base that an adapter was trained on: the few numbers of its fingerprint, read from the
files.

The rest of a fingerprint speaks of a model, with heads and ties as its class has them; of files only the numbers count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import differences, fingerprint, places
from .base import Base
from .parts import open_parts
from .where import find_places


def compare_with_files(base: Base, adapter: Adapter, rename: Callable[[str], str]) -> list[str]:
    """What tells this base from the one fingerprinted; empty if nothing does, or the adapter has no fingerprint.

    `rename`: from the adapter's names of parameters to the files'.
    """
    expected = adapter.metadata.get("fingerprint")
    if not expected or base.single_file:
        return []
    if not isinstance(expected, Mapping) or not isinstance(expected.get("samples"), Mapping):
        return ["the adapter's fingerprint of its base is damaged"]
    samples, found = {}, {}
    for name, numbers in expected["samples"].items():
        slot = base.tensors.get(rename(name))
        replaced = name in adapter.saved  # a fresh head is not the base's
        if slot is not None and slot.nbytes and slot.torch_dtype is not None and not replaced:
            samples[name] = numbers
            # Where a fingerprint looks, and no more than that: of these few numbers it takes each.
            found[name] = slot.numbers(places(math.prod(slot.shape)))
    rounding = {"rounding": expected["rounding"]} if "rounding" in expected else {}
    return differences({**fingerprint(found, ""), "samples": samples, **rounding}, found, "")


def compare_with_base(path: Path, adapter: Adapter) -> list[str]:
    """The same for a checkpoint's folder, a pipeline's or a single file. LorakitError if it lacks one of the adapter's
    modules.
    """
    lines = []
    for part in open_parts(path, list(adapter.updates)):
        own = part.own(adapter)
        if own is not None:
            lines += compare_with_files(part.base, own, find_places(part.base, own.updates).rename)
    return lines
