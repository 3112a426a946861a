"""Merge what a receiver does not accept into a copy of the base, and keep the rest as an adapter of that copy.

base + adapter = (base + part) + rest        part and rest never change the same weight
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapter.adapter import Adapter
from ..adapter.algebra.reform import with_updates
from ..checkpoint import merge_checkpoint
from ..checkpoint.base import open_base
from ..checkpoint.modules import layout_of
from ..checkpoint.out import check_out
from ..checkpoint.parts import PIPELINE
from ..errors import AdapterError
from ..io.staging import resolved


@dataclass(frozen=True)
class Split:
    """An adapter split in two: `adapter` = `part` + `rest`. `copy`: the path for `base` + `part`."""

    adapter: Adapter
    part: Adapter
    rest: Adapter
    base: Path
    copy: Path

    def write(self, rest: Adapter, path: Path) -> Adapter:
        """Write `base` + `part` to the temporary `path`. Returns `rest`, with the copy's name and fingerprint."""
        merge_checkpoint(self.base, self.part, path, untie=True)
        is_image_model = self.base.is_file() or (self.base / PIPELINE).is_file()
        fingerprint = None if is_image_model else layout_of(open_base(path)).fingerprint()
        metadata = {key: value for key, value in rest.metadata.items() if key != "fingerprint"}
        metadata |= {"fingerprint": fingerprint} if fingerprint else {}
        return replace(rest, config=rest.config.replace(base=str(self.copy)), metadata=metadata)


def split(
    adapter: Adapter, names: Collection[str], base: Path, out: Path, force: bool, source: Path | None = None
) -> Split:
    """Split off the modules and saved weights in `names`, to be merged into a copy of `base` at OUT-base.

    source: the path the adapter was read from, which must not be overwritten.
    LorakitError if OUT-base exists and may not be replaced, or if nothing is left for the adapter.
    """
    copy = out.with_name(f"{out.stem}-base.safetensors" if base.is_file() else f"{out.name}-base")
    part, rest = divide(adapter, names)
    check_out(resolved(base), [resolved(source)] if source is not None else [], resolved(copy), force)
    return Split(adapter, part, rest, base, copy)


def divide(adapter: Adapter, names: Collection[str]) -> tuple[Adapter, Adapter]:
    """Split into (modules and saved weights in `names`, the rest). Raises AdapterError if the rest has no module."""

    def part_of(inside: bool) -> Adapter:
        saved = {n: t for n, t in adapter.saved.items() if (n in names) == inside}
        modules = [m for m in adapter.config.save_modules if any(f".{m}." in f".{n}" for n in saved)]
        biases = any(n.endswith(".bias") and not any(f".{m}." in f".{n}" for m in modules) for n in saved)
        config = adapter.config.replace(save_modules=modules, bias=adapter.config.bias if biases else "none")
        updates = {m: u for m, u in adapter.updates.items() if (m in names) == inside}
        return with_updates(adapter, updates, saved=saved, config=config)

    part, rest = part_of(True), part_of(False)
    if not rest.updates:
        raise AdapterError(
            "merging this would leave nothing of the adapter\n  lorakit merge BASE ADAPTER OUT merges all of it"
        )
    return replace(part, embeddings={}), rest
