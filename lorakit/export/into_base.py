"""What a receiver does not take of an adapter, merged into a copy of its base; the rest stays an adapter, of that copy.

base + adapter = (base + part) + rest        no weight is changed by both
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


@dataclass(frozen=True)
class Split:
    """`whole` = `part` + `rest`; `copy`: where `base` + `part` is to be."""

    whole: Adapter
    part: Adapter
    rest: Adapter
    base: Path
    copy: Path

    def write(self, rest: Adapter, place: Path) -> Adapter:
        """Write the copy at `place`, to be moved; gives `rest` (mended) as an adapter of the copy, of which it has the name and the fingerprint."""
        merge_checkpoint(self.base, self.part, place, untie=True)
        known = None if self.base.is_file() or (self.base / PIPELINE).is_file() else layout_of(open_base(place)).fingerprint()
        metadata = {key: value for key, value in rest.metadata.items() if key != "fingerprint"} | ({"fingerprint": known} if known else {})
        return replace(rest, config=rest.config.replace(base=str(self.copy)), metadata=metadata)


def split(adapter: Adapter, names: Collection[str], base: Path, out: Path, force: bool, source: Path | None = None) -> Split:
    """`names`: of the modules and whole weights that go into the copy, OUT-base. LorakitError if that is in the way, or nothing else is left.

    source: where the adapter lies, if it does: it is only read.
    """
    copy = out.with_name(f"{out.stem}-base.safetensors" if base.is_file() else f"{out.name}-base")
    part, rest = divide(adapter, names)
    check_out(base.resolve(), [source.resolve()] if source is not None else [], copy.resolve(), force)
    return Split(adapter, part, rest, base, copy)


def divide(adapter: Adapter, names: Collection[str]) -> tuple[Adapter, Adapter]:
    """(the modules and whole weights of these names, all others). AdapterError if nothing else is left."""

    def those(wanted: bool) -> Adapter:
        saved = {n: t for n, t in adapter.saved.items() if (n in names) == wanted}
        modules = [m for m in adapter.config.save_modules if any(f".{m}." in f".{n}" for n in saved)]
        biases = any(n.endswith(".bias") and not any(f".{m}." in f".{n}" for m in modules) for n in saved)
        config = adapter.config.replace(save_modules=modules, bias=adapter.config.bias if biases else "none")
        updates = {m: u for m, u in adapter.updates.items() if (m in names) == wanted}
        return with_updates(adapter, updates, saved=saved, config=config)

    part, rest = those(True), those(False)
    if not rest.updates:
        raise AdapterError(
            "nothing of this adapter would be left beside the base\n  lorakit merge BASE ADAPTER OUT makes one model of both"
        )
    return replace(part, embeddings={}), rest
