"""Whether a checkpoint is the base that an adapter was trained on: compare the samples of the fingerprint.

The fingerprint's other entries describe a model, with the heads and ties of its class; files are compared by the
samples only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import (
    ONLY_ON,
    Quantized,
    Weight,
    differences,
    fingerprint,
    rounded_otherwise,
    sample_positions,
)
from ..adapter.tokens import Tokens
from ..io.stream import Slot
from .base import Base
from .experts import as_stored
from .locate import locate
from .parts import open_parts
from .quantized.weight import PackedSlot


def compare_with_files(base: Base, adapter: Adapter, rename: Callable[[str], str]) -> list[str]:
    """List the differences between this base and the adapter's fingerprint, one line each; empty if there are none, or
    the adapter has no fingerprint. `rename`: from the adapter's parameter names to the files'.
    """
    expected = adapter.metadata.get("fingerprint")
    if not expected or base.single_file:
        return []
    if not _has_samples(expected):
        return ["the adapter's fingerprint of its base is damaged"]
    stored = _stored(base, adapter, rename)
    samples = {name: expected["samples"][name] for name in stored}
    rounding = {"rounding": expected["rounding"]} if "rounding" in expected else {}
    return differences({**fingerprint(stored, ""), "samples": samples, **rounding}, stored, "")


def quantized_otherwise(base: Base, adapter: Adapter, rename: Callable[[str], str]) -> str | None:
    """Return what a base is instead of quantized as an adapter needs it that repairs what quantization lost (LoftQ);
    None if it is quantized so, or the adapter needs nothing. `rename`: as above.
    """
    needed, known = adapter.metadata.get(ONLY_ON), adapter.metadata.get("fingerprint")
    if not needed:
        return None
    if base.quantization is None:
        return "not quantized"
    if base.quantization.format.title != needed:
        return base.quantization.format.title
    other = rounded_otherwise(known, _stored(base, adapter, rename)) if _has_samples(known) else None
    return None if other is None else f"rounded to other values, such as those of {other}"


def _has_samples(known: Any) -> bool:
    return isinstance(known, Mapping) and isinstance(known.get("samples"), Mapping)


def _stored(base: Base, adapter: Adapter, rename: Callable[[str], str]) -> dict[str, Weight]:
    """Return the weights of a base that the adapter's fingerprint has samples of, by the fingerprint's names."""
    stored: dict[str, Weight] = {}
    tokens = {f"{m}.weight" for m, update in adapter.updates.items() if isinstance(update, Tokens)}
    for name in adapter.metadata["fingerprint"]["samples"]:
        slot = base.tensors.get(rename(name))
        replaced = name in adapter.saved or name in tokens  # a new head, or rows for new tokens, are not the base's
        if slot is not None and slot.nbytes and slot.torch_dtype is not None and not replaced:
            stored[name] = _samples(slot)
    return stored


def _samples(slot: Slot) -> Weight:
    """Read only the elements that a fingerprint samples. It samples every element of a tensor this small."""
    at = sample_positions(math.prod(slot.shape))
    if not isinstance(slot, PackedSlot):
        return slot.elements(at)
    values, errors = slot.sampled(torch.tensor(at))
    return Quantized((len(at),), lambda chosen: (values[chosen], errors[chosen]))


def compare_with_base(path: Path, adapter: Adapter) -> list[str]:
    """Compare a checkpoint folder, a pipeline or a single file, as `compare_with_files` does.

    Raises LorakitError if it lacks one of the adapter's modules.
    """
    lines = []
    for part in open_parts(path, list(adapter.updates), quantized=True):
        own = part.own(adapter)
        if own is not None:
            stored = {m: u for each in as_stored(part.base, own.updates).values() for m, u in each.items()}
            lines += compare_with_files(part.base, own, locate(part.base, stored).rename)
    return lines
