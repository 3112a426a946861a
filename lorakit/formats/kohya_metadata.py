"""The metadata of a kohya file: `ss_*` (how it was trained), `modelspec.*` (Stability's ModelSpec 1.0.1), `sshs_*`
(hashes).

Programs identify the base by it (metadata without `ss_v2` and without "sdxl" means SD1), and sites find a file by its
hash:

    sshs_model_hash    sha256 of all bytes after the safetensors header; its first 12 digits are CivitAI's AutoV3
    sshs_legacy_hash   the first 8 digits of the sha256 of the file's bytes 0x100000 to 0x110000; e3b0c442, of nothing,
                       under 1 MiB

The metadata of the file that was read (`Adapter.metadata["header"]`) is kept, except for what describes the tensors. Of
a run of ours `run_metadata.py` tells the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..io.atomic import replacing
from ..io.stream import NAMES, StreamWriter
from .run_metadata import own_entry, run_metadata

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
ALGORITHMS = {"lora": "locon", "loha": "loha", "lokr": "lokr"}  # LyCORIS' names of the kinds
LEGACY_BYTES = (0x100000, 0x10000)  # (offset, length)


class Base(NamedTuple):
    """A base model's names in the metadata."""

    version: str
    architecture: str
    implementation: str
    module: str
    resolution: str


BASES = {
    "sd1": Base("sd_v1", "stable-diffusion-v1", "diffusers", "networks.lora", "512x512"),
    "sd2": Base("sd_v2", "stable-diffusion-v2-512", "diffusers", "networks.lora", "512x512"),
    "sdxl": Base(
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
        "networks.lora",
        "1024x1024",
    ),
    "sd3": Base("sd3", "stable-diffusion-3-m", "diffusers", "networks.lora_sd3", "1024x1024"),
    "flux": Base("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux", "networks.lora_flux", "1024x1024"),
}


_MUSUBI = "https://github.com/kohya-ss/musubi-tuner"
# model -> (the metadata's version, the module that trains it), as musubi-tuner and sd-scripts write them.
_OTHERS = {
    "flux2": ("flux_2", "networks.lora_flux_2"),
    "wan": ("wan", "networks.lora_wan"),
    "hunyuan_video": ("hunyuan_video", "networks.lora"),
    "qwen_image": ("qwen_image", "networks.lora_qwen_image"),
    "z_image": ("z_image", "networks.lora_zimage"),
    "chroma": ("chroma", "networks.lora_flux"),
    "lumina2": ("lumina2", "networks.lora_lumina"),
    "kandinsky5": ("kandinsky5", "networks.lora_kandinsky"),
}


def base_of(model: str | None) -> Base:
    """How the metadata names a model; one that is not known has no name."""
    if model in BASES:
        return BASES[str(model)]
    version, module = _OTHERS.get(str(model), (model or "other", "networks.lora"))
    return Base(version, version, _MUSUBI, module, "1024x1024")


def stated_model(header: Mapping[str, str]) -> str | None:
    """The model of `names.KNOWN` that a file's metadata states; None if it states none."""
    version, architecture = header.get("ss_base_model_version", ""), header.get("modelspec.architecture", "")
    starts = (
        ("sdxl", "stable-diffusion-xl", "sdxl"),
        ("sd_v1", "stable-diffusion-v1", "sd1"),
        ("sd_v2", "stable-diffusion-v2", "sd2"),
        ("sd3", "stable-diffusion-3", "sd3"),
        *((theirs, theirs, ours) for ours, (theirs, _) in _OTHERS.items()),  # flux_2 before flux
        ("flux", "flux-1", "flux"),
    )
    for theirs, spec, ours in starts:
        if version.startswith(theirs) or (not version and architecture.lower().startswith(spec)):
            return ours
    return {"True": "sd2", "False": "sd1"}.get(header.get("ss_v2", "")) if not version and not architecture else None


def metadata(
    adapter: Adapter, model: str | None, written: Mapping[str, tuple[Update, Tensor | None]], title: str
) -> dict[str, str]:
    """The metadata to write, without the hashes. `model`: one of `names.KNOWN`, None if lorakit does not know it.
    `written`: key -> (its update, its alpha as written or None).
    """
    base = base_of(model)
    header = {str(k): str(v) for k, v in _plain(adapter.metadata.get("header")).items()}
    outdated = {MODEL_HASH, LEGACY_HASH, "modelspec.hash_sha256", "lorakit"}
    # Another format's header describes that format's tensors; what a trainer wrote, and ModelSpec, hold here too.
    trainers = any(k.startswith("ss_") for k in header)
    kept = {k: v for k, v in header.items() if k not in outdated and (trainers or k.startswith("modelspec."))}
    stated = kept if model is None or stated_model(header) == model else {}  # nothing about another base holds
    found = (
        run_metadata(adapter.metadata)
        | kept
        | {
            "format": "pt",
            "ss_base_model_version": stated.get("ss_base_model_version", base.version),
            "ss_v2": str(model == "sd2"),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": stated.get("modelspec.architecture", f"{base.architecture}/lora"),
            "modelspec.implementation": stated.get("modelspec.implementation", base.implementation),
        }
    )
    found.setdefault("modelspec.title", found.get("ss_output_name", title))
    found.setdefault("modelspec.resolution", base.resolution)
    found.setdefault("ss_output_name", title)
    found |= _network(stated, base, written)
    return found | own_entry(adapter.metadata, "header", "model", "spelling")


def _network(
    header: Mapping[str, str], base: Base, written: Mapping[str, tuple[Update, Tensor | None]]
) -> dict[str, str]:
    """ss_network_*: rank and alpha, "Dynamic" if modules differ. Those of convolutions with a kernel are in the
    arguments.
    """
    updates = [update for update, _ in written.values()]
    lycoris = any(u.variant != "lora" for u in updates)
    kernels = {key for key, (u, _) in written.items() if u.factors is not None and u.factors.A[0, 0].numel() > 1}
    linear = [written[key] for key in written if key not in kernels] or [written[key] for key in kernels]
    arguments = _arguments(header)
    arguments.pop("algo", None)
    if all(u.factors is not None for u in updates):  # other kinds keep what the file stated
        for name in ("conv_dim", "conv_alpha", "conv_rank"):
            arguments.pop(name, None)
    if kernels:
        convs = [written[key] for key in sorted(kernels)]
        arguments["conv_dim"] = _common(_rank(u) for u, _ in convs)
        arguments["conv_alpha"] = _common(_alpha(update, alpha) for update, alpha in convs)
    if lycoris:
        algos = {ALGORITHMS.get(u.without_base().variant, "full") for u in updates}
        arguments["algo"] = algos.pop() if len(algos) == 1 else "Dynamic"
    module = "lycoris.kohya" if lycoris else header.get("ss_network_module", base.module)
    found = {
        "ss_network_module": base.module if module.startswith("lycoris") and not lycoris else module,
        "ss_network_dim": _common(_rank(u) for u, _ in linear),
        "ss_network_alpha": _common(_alpha(u, alpha) for u, alpha in linear if u.variant != "dense"),
    }
    return found | {"ss_network_args": json.dumps(arguments)}


def _arguments(header: Mapping[str, str]) -> dict[str, Any]:
    try:
        return _plain(json.loads(header.get("ss_network_args", "{}")))
    except (ValueError, RecursionError):
        return {}


def _common(values: Iterable[float]) -> str:
    """The only value as text, like kohya writes it; "Dynamic" if there are several."""
    found = set(values)
    return "Dynamic" if len(found) != 1 else str(found.pop())


def _rank(update: Update) -> int:
    """The rank as a file has it: of a packed projection that of all its parts."""
    return update.rank if update.factors is None else update.factors.A.shape[0]


def _alpha(update: Update, alpha: Tensor | None) -> float:
    return float(alpha) if alpha is not None else float(update.rank)


def _plain(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def write_hashed(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file with its own two hashes in its header, atomically.

    The hashes have a fixed length, so that inserting them moves nothing. Tensors are sorted by the size of their dtype,
    then by name, as the safetensors library sorts them.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ready = {name: tensors[name].detach().cpu().contiguous() for name in order}
    empty = {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
    layout = {name: (NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in ready.items()}
    with replacing(path) as temporary:
        # The hashes come first: past 1 MiB, behind long metadata, the second one would cover itself.
        with StreamWriter(temporary, layout, empty | dict(sorted(header.items()))) as out:
            for tensor in ready.values():
                out.write(tensor)
        hashes = dict(zip(empty, file_hashes(temporary)))
        with open(temporary, "rb+") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size)
            for name, value in empty.items():
                text = text.replace(f'"{name}":"{value}"'.encode(), f'"{name}":"{hashes[name]}"'.encode(), 1)
            file.seek(8)
            file.write(text)


def file_hashes(path: Path) -> tuple[str, str]:
    """(model hash, legacy hash) of a safetensors file."""
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        model = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(LEGACY_BYTES[0])
        return model, hashlib.sha256(file.read(LEGACY_BYTES[1])).hexdigest()[:8]
