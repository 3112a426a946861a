"""The parts of a base that an adapter can be merged into, each with weights of its own.

a transformers folder      one part, without a name
a diffusers pipeline       a folder with model_index.json; a part for each component (unet/, text_encoder/...), whose
                           name is the first part of an adapter's module names
a single file              a diffusion model's: one part
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import TargetError, listing
from ..io.json_object import read_json
from .base import Base, open_base, open_single_file, without_variant

PIPELINE = "model_index.json"


@dataclass(frozen=True)
class Part:
    """`name`: the component's and its folder's name; "" unless the base is a pipeline."""

    name: str
    base: Base

    def own(self, adapter: Adapter) -> Adapter | None:
        """Return the part of an adapter that is for this component, with names within it; None if there is none."""
        if not self.name:
            return adapter
        updates = _within(self.name, adapter.updates)
        saved = _within(self.name, adapter.saved)
        if not updates and not saved:
            return None
        return replace(adapter, updates=updates, saved=saved, metadata=_fingerprint_within(self.name, adapter.metadata))

    def file(self, name: str, converted: bool) -> str:
        """Return the name of a weights file in OUT. Only pipelines keep a variant (fp16), if the dtype stays."""
        return name if self.name and not converted else without_variant(name) if not self.base.single_file else name

    def called(self, name: str) -> str:
        """Return a module's or tensor's full name, with the component in front; of "" the prefix that all share."""
        return f"{self.name}.{name}" if self.name else name


def open_parts(path: Path, names: Collection[str], everything: bool = False, quantized: bool = False) -> list[Part]:
    """Open the parts that have these modules or weights; with `everything` all that have weights.

    quantized: whether quantized weights may be read. Raises LorakitError if the path is not a checkpoint, or is
    quantized where that is not allowed; TargetError for a name outside all components.
    """
    if path.is_file():
        return [Part("", open_single_file(path))]
    if not (path / PIPELINE).is_file():
        return [Part("", open_base(path, quantized))]
    components = [
        name
        for name, value in read_json(path / PIPELINE).items()
        if isinstance(value, list)
        and name not in ("", ".", "..")
        and Path(name).name == name
        and (path / name / "config.json").is_file()
    ]
    unknown = [n for n in names if n.partition(".")[0] not in components]
    if unknown:
        raise TargetError(
            f"the adapter changes '{unknown[0]}', which is in no component of {path} (it has {listing(components)})\n"
            "  is it an adapter for another model?"
        )
    touched = {n.partition(".")[0] for n in names}
    chosen = [c for c in components if c in touched or (everything and any((path / c).glob("*.safetensors")))]
    return [Part(name, replace(open_base(path / name, quantized), component=name)) for name in chosen]


def _within(component: str, named: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{component}."
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}


def _fingerprint_within(component: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata with only this component's samples in its fingerprint."""
    known = metadata.get("fingerprint")
    if not isinstance(known, Mapping) or not isinstance(known.get("samples"), Mapping):
        return dict(metadata)
    samples = _within(component, known["samples"])
    rounding = known.get("rounding")
    own = {"rounding": _within(component, rounding)} if isinstance(rounding, Mapping) else {}
    return (
        {**metadata, "fingerprint": {**known, "samples": samples, **own, "architecture": None}}
        if samples
        else {k: v for k, v in metadata.items() if k != "fingerprint"}
    )
