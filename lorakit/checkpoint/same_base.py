"""Whether a checkpoint is the base that an adapter was trained on: compare the samples of the fingerprint.

The fingerprint's other entries describe a model, with the heads and ties of its class; files are compared by the
samples only.
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
    """The differences between this base and the adapter's fingerprint, one line each; empty if there are none, or the
    adapter has no fingerprint. `rename`: from the adapter's parameter names to the files'.
    """
    expected = adapter.metadata.get("fingerprint")
    if not expected or base.single_file:
        return []
    if not isinstance(expected, Mapping) or not isinstance(expected.get("samples"), Mapping):
        return ["the adapter's fingerprint of its base is damaged"]
    samples, found = {}, {}
    for name, numbers in expected["samples"].items():
        slot = base.tensors.get(rename(name))
        replaced = name in adapter.saved  # a new head is not the base's
        if slot is not None and slot.nbytes and slot.torch_dtype is not None and not replaced:
            samples[name] = numbers
            # Read only the elements that a fingerprint samples; of a tensor this small it then samples all.
            found[name] = slot.numbers(places(math.prod(slot.shape)))
    rounding = {"rounding": expected["rounding"]} if "rounding" in expected else {}
    return differences({**fingerprint(found, ""), "samples": samples, **rounding}, found, "")


def compare_with_base(path: Path, adapter: Adapter) -> list[str]:
    """`compare_with_files` for a checkpoint folder, a pipeline or a single file. LorakitError if it lacks one of the
    adapter's modules.
    """
    lines = []
    for part in open_parts(path, list(adapter.updates)):
        own = part.own(adapter)
        if own is not None:
            lines += compare_with_files(part.base, own, find_places(part.base, own.updates).rename)
    return lines
