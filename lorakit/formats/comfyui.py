"""The dotted file of ComfyUI and most trainers since 2025: the original code's names behind `diffusion_model.`.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight, .alpha where it is not the rank
    diffusion_model.blocks.0.self_attn.q.lokr_w1, .hada_w1_a, .diff, .diff_b, .dora_scale     LyCORIS' suffixes
    lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight                           text encoders, as kohya's

Reading is `diffusers.read`, which takes every dotted spelling. Of a model whose names are known (`names.KNOWN`) the
original names are written, fused weights fused; Z-Image has diffusers' names, which its trainers write and diffusers
reads too (ComfyUI maps them to its fused weights). The names of any other model are written as they were read, and so
is a file whose spelling was recorded (`native.py`): what is edited stays readable where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..errors import AdapterError, listing
from ..io.tensors import write_tensors
from . import kohya, kohya_metadata, names
from .diffusers import read
from .format import Format, ReadOptions, WriteOptions
from .native import COMFYUI, written
from .pipeline_names import in_pipeline
from .run_metadata import own_entry, run_metadata
from .spellings import NATIVE
from .unheld import beside_updates

__all__ = ["FORMAT", "losses", "places", "read", "write_as_read"]
_TEXT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def losses(adapter: Adapter) -> list[str]:
    """What this format cannot hold of an adapter, one line each."""
    return _losses(in_pipeline(adapter), COMFYUI)


def write_as_read(adapter: Adapter, path: Path, spelling: Mapping[str, Any]) -> Path:
    """Write a `.safetensors` file in this spelling: `native.COMFYUI`, or `Adapter.metadata["spelling"]`. AdapterError
    if anything of the adapter would be lost.
    """
    adapter = in_pipeline(adapter.check())
    lost = _losses(adapter, spelling)
    if lost:
        raise AdapterError(f"{path}: this format cannot hold all of this adapter\n  " + "\n  ".join(lost))
    tensors: dict[str, Tensor] = {}
    for name, update, shape in _named(adapter, spelling):
        tensors |= written(name, update, shape, spelling)
    header = {"format": "pt"} | {str(k): str(v) for k, v in (adapter.metadata.get("header") or {}).items()}
    if run_metadata(adapter.metadata):
        changes = {m: (u, None) for m, u in adapter.updates.items()}
        header |= kohya_metadata.metadata(adapter, _model(adapter), changes, path.stem)
    write_tensors(path, tensors, header | own_entry(adapter.metadata, "header", "spelling", "model"))
    return path


def _losses(adapter: Adapter, spelling: Mapping[str, Any]) -> list[str]:
    model = _model(adapter)
    lines = beside_updates(adapter)
    if model is None:
        strange = [m for m in adapter.updates if not m.startswith(f"{NATIVE}.") and not spelling.get("own")]
        if strange:
            lines.append(
                f"{listing(strange, 3)}: no module of a diffusion model that lorakit knows, nor named {NATIVE}.…"
            )
    else:
        grouped, unplaced = kohya.grouped(adapter, places(model, spelling))
        if unplaced:
            lines.append(f"{model} has no original name for {len(unplaced)} of its modules: {listing(unplaced, 3)}")
        lines += [
            f"'{place.key}': one weight there, and the adapter's updates of {listing(place.modules)} are no one update"
            for place, found in grouped.items()
            if kohya.fused(place, found, model) is None
        ]
    return lines + kohya.unholdable(adapter)


def _model(adapter: Adapter) -> str | None:
    """None where the modules keep the file's own names."""
    return None if any(m.startswith(f"{NATIVE}.") for m in adapter.updates) else kohya.written_for(adapter)


def places(model: str, spelling: Mapping[str, Any] = COMFYUI) -> dict[str, names.KohyaKey]:
    """A module's name -> its place, whose key is the dotted name as this file writes it."""
    found: dict[str, names.KohyaKey] = {}
    for component, part in names.PIPELINES[model].items():
        listed = names.module_list(part.listed)
        denoiser = not component.startswith("text_encoder")
        dotted = {name: (name,) for name in listed["modules"]}
        if denoiser and spelling.get("original", model not in names.UNFUSED):
            originals = {name: tuple(parts) for name, parts in listed.get("ldm", {}).items()}
            taken = {module for parts in originals.values() for module in parts}
            dotted = {name: parts for name, parts in dotted.items() if name not in taken} | originals
        for name, parts in dotted.items():
            modules = tuple(f"{component}.{module}" for module in parts)
            key = spelling["front"] + name if denoiser else _text_key(component, part, name, spelling)
            found |= dict.fromkeys(modules, names.KohyaKey(key, modules))
    return found


def _text_key(component: str, part: names.Component, name: str, spelling: Mapping[str, Any]) -> str:
    if spelling.get("text") == "diffusers":
        return f"{component}.{name}"
    if spelling.get("text") == "comfyui":
        encoder = "t5xxl" if part.listed == "t5" else _TEXT[component]
        return f"text_encoders.{encoder}.transformer.{name}"
    return part.prefixes[0] + name.replace(".", "_")


def _named(adapter: Adapter, spelling: Mapping[str, Any]) -> list[tuple[str, Update, tuple[int, ...]]]:
    """(the name to write, its update, the weight's shape as far as it is known)."""
    model = _model(adapter)
    if model is None:
        return [(module, u, u.weight_shape() if u.changes_weight else ()) for module, u in adapter.updates.items()]
    grouped, _ = kohya.grouped(adapter, places(model, spelling))
    found = []
    for place, updates in grouped.items():
        update = kohya.fused(place, updates, model)
        assert update is not None
        found.append((place.key, update, names.shapes(model)[place.modules[0]]))
    return found


class Comfyui(Format):
    """ComfyUI's file, behind the interface of all formats. A file of it is detected as diffusers', which reads both."""

    name = "comfyui"
    tells_model = True

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return read(*self.tensors_in(path), options.model_type)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write_as_read(adapter, path, options.spelling or COMFYUI)

    def holds(self, spelling: Mapping[str, Any]) -> bool:
        return "prefix" not in spelling


FORMAT = Comfyui()
