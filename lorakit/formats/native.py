"""Dotted keys in the names that a model's first publisher gave its modules: told, and turned into kohya's flat keys.

    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight     ComfyUI, ai-toolkit, most trainers since 2025
    blocks.0.self_attn.q.lora_A.default.weight, pipe.dit.blocks…   DiffSynth: bare, or as the pipeline names it
    transformer.double_blocks.0.img_attn_qkv.lora_A.weight         original names behind diffusers' component
    layers.0.attention.to_q.lora_down.weight                       diffusers' names without a component
    lora_te1_text_model_…, text_encoders.clip_l.transformer.…      text encoders beside any of these

With its dots made underscores such a path is a key of kohya's, so `names.py` knows it. How a file was spelled is kept
in `Adapter.metadata["spelling"]`, so that it can be written back so (`comfyui.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..adapter.update import Update
from ..errors import AdapterError
from . import lycoris, names
from .kohya_metadata import stated_model
from .scale import with_alpha_as_rank
from .spellings import COMPONENTS, NATIVE, parse, split
from .telling import Told, size_of, tell

# In front of a denoiser's path; what a file has in front of all its keys is kept for writing it back.
FRONTS = (
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.diffusion_model.",
    "pipe.dit.",
    "dit.",
    "transformer.",
    "conditional_transformer.",
    "net.",
    "base_model.model.",
    "unet.",
    "",
)
UNET = "lora_unet_"
COMFYUI: dict[str, Any] = {  # a spelling
    "front": f"{NATIVE}.",
    "pair": "lora_A",
    "alphas": True,
    "text": "kohya",
}
# ComfyUI's names of the text encoders -> the component in each pipeline, the first that the model has counts.
_TEXT = {"clip_l": ("text_encoder",), "clip_g": ("text_encoder_2",), "t5xxl": ("text_encoder_3", "text_encoder_2")}
_COMFYUI_TEXT = re.compile(r"text_encoders\.(?P<name>\w+?)\.(?:transformer\.)?(?P<path>.+)")
_COMPONENT_TEXT = re.compile(r"(?P<name>text_encoder(?:_\d)?)\.(?P<path>.+)")


class Native(NamedTuple):
    """`tensors`: by kohya's keys. `model`: one of `names.KNOWN`."""

    tensors: dict[str, Tensor]
    model: str
    spelling: dict[str, Any]


def flattened(
    where: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], model: str | None = None
) -> Native | None:
    """The file as kohya's, or None where its keys are diffusers' own names, or those of no known model.

    model: said by the user. AdapterError where names fit a model whose widths they have not.
    """
    denoiser: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = split(key)
        if found is None:
            return None
        path, suffix = found
        text = path.startswith(names.PREFIXES) or _COMFYUI_TEXT.match(path) or _COMPONENT_TEXT.match(path)
        (beside if text else denoiser).setdefault(path, {})[suffix] = tensor
    if not denoiser:
        return _text_encoders_alone(tensors, beside)
    flat_keys = [path for path in beside if path.startswith(names.PREFIXES)]
    front, told = _told(denoiser, flat_keys, stated_model(header), model)
    if told is not None and told.contradiction:
        raise AdapterError(contradicting(where, told))
    if told is None or told.model is None or _diffusers_own(tensors, front, told.model):
        return None
    flat = {UNET + _flat(path[len(front) :]): parts for path, parts in denoiser.items()}
    original = any(names.modules_of(told.model)[key] != (_diffusers(key, told.model),) for key in flat)
    for path, parts in beside.items():
        place = _beside(path, told.model)
        if place is None:
            return None
        flat[place] = parts
    named = {f"{key}.{suffix}": tensor for key, parts in flat.items() for suffix, tensor in parts.items()}
    return Native(named, told.model, spelled(tensors) | {"front": front, "original": original, "text": _text(beside)})


def _text_encoders_alone(tensors: Mapping[str, Tensor], beside: Mapping[str, Mapping[str, Tensor]]) -> Native | None:
    """ComfyUI's text encoders without a denoiser, of the first pipeline that has them all; None for other spellings."""
    if not all(map(_COMFYUI_TEXT.fullmatch, beside)):
        return None
    for model in ("flux", "sdxl", "sd3"):
        keys = [_beside(path, model) for path in beside]
        if all(key in names.modules_of(model) for key in keys):
            named = {f"{key}.{s}": t for key, parts in zip(keys, beside.values()) for s, t in parts.items()}
            return Native(named, model, spelled(tensors) | {"front": "", "original": True, "text": "comfyui"})
    return None


def spelled(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """How a file spells its tensors: which pair of names, and whether alphas, and what a norm's change is called."""
    down = any(".lora_down." in key for key in tensors if not key.startswith(names.PREFIXES))
    spelling: dict[str, Any] = {"pair": "lora_down" if down else "lora_A"}
    low_rank = {path for key in tensors for path, suffix in [split(key) or ("", "")] if suffix == "lora_up.weight"}
    if any(f"{path}.alpha" in tensors for path in low_rank):
        spelling["alpha"] = True
    if any(key.endswith(".alpha") for key in tensors):
        spelling["alphas"] = True
    if any(key.endswith((".w_norm", ".b_norm")) for key in tensors):
        spelling["norm"] = True
    return spelling


def contradicting(where: Path, told: Told) -> str:
    """The error where names fit a model, and widths fit none."""
    return (
        f"{where}: its names are those of {told.nearest}, but its widths are no known model's: {told.contradiction}\n"
        "  say which model it is (--model-type, model_type=): one of "
        f"{', '.join(names.KNOWN)}; or 'other', to keep the file's own names"
    )


def written(name: str, update: Update, shape: tuple[int, ...], spelling: Mapping[str, Any]) -> dict[str, Tensor]:
    """One update's tensors by full key, in a file's own spelling of the suffixes."""
    flat = name.startswith(names.PREFIXES)
    pair = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    norm = {"w_norm": "diff", "b_norm": "diff_b"}
    found: dict[str, Tensor] = {}
    own, plain = (lycoris.tensors_of(name, update, shape), False) if flat else as_read(name, update, shape, spelling)
    for key, tensor in own.items():
        suffix = key.removeprefix(f"{name}.")
        if suffix == "alpha" and plain:
            continue
        if not flat and spelling.get("pair") != "lora_down":
            suffix = pair.get(suffix, suffix)
        found[f"{name}.{suffix if spelling.get('norm') else norm.get(suffix, suffix)}"] = tensor
    return found


def as_read(
    name: str, update: Update, shape: tuple[int, ...], spelling: Mapping[str, Any]
) -> tuple[dict[str, Tensor], bool]:
    """(an update's tensors by kohya's keys, whether its alpha is to be left out): where the file had none, the scale of
    low-rank factors goes into B. Every reader takes a missing alpha for the rank, and some take no other.
    """
    own = lycoris.tensors_of(name, update, shape)
    low_rank = f"{name}.lora_up.weight" in own
    if spelling.get("alpha" if low_rank else "alphas"):
        return own, False
    plain = update.with_weight(update.weight_alone.map_factors(with_alpha_as_rank))
    return lycoris.tensors_of(name, plain, shape), plain.scale == 1


def _told(
    denoiser: Mapping[str, Mapping[str, Tensor]], beside: list[str], said: str | None, model: str | None
) -> tuple[str, Told | None]:
    """(what stands in front of all paths, the model they are of), of the fronts in use."""
    for front in FRONTS:
        if not all(path.startswith(front) for path in denoiser):
            continue
        sizes = {UNET + _flat(path[len(front) :]): size_of(parts) for path, parts in denoiser.items()}
        if model is not None:
            if all(key in names.modules_of(model) for key in sizes):
                return front, Told(model, model, [])
            continue
        told = tell(sizes | dict.fromkeys(beside), said)
        if told.model is not None or told.contradiction:
            return front, told
    return "", None


def _diffusers_own(tensors: Mapping[str, Tensor], front: str, model: str) -> bool:
    """Whether every key has its component written or told by its first name, or another key's, and diffusers' path."""
    found = [None if key.startswith(names.PREFIXES) else parse(key) for key in tensors]
    if not any(name is not None and name.component in COMPONENTS for name in found):
        return False
    for name in found:
        if name is None or name.component not in (*COMPONENTS, None):
            return False
        if name.component in ("transformer", None) and f"transformer.{name.path}" not in names.shapes(model):
            return False
    return True


def _diffusers(key: str, model: str) -> str:
    """diffusers' name of a module, if this key is that name with underscores."""
    modules = names.modules_of(model)[key]
    return modules[0] if len(modules) == 1 and UNET + _flat(modules[0].partition(".")[2]) == key else ""


def _beside(path: str, model: str) -> str | None:
    """kohya's key of a text encoder's module; None if the model has no such encoder."""
    if path.startswith(names.PREFIXES):
        return path
    comfyui, pipeline = _COMFYUI_TEXT.fullmatch(path), names.PIPELINES[model]
    match = comfyui or _COMPONENT_TEXT.fullmatch(path)
    assert match is not None
    parts = _TEXT.get(match["name"], ()) if comfyui else (match["name"],)
    component = next((part for part in parts if part in pipeline), None)
    return None if component is None else pipeline[component].prefixes[0] + _flat(match["path"])


def _text(beside: Mapping[str, Any]) -> str:
    """How text encoders are spelled: "kohya", "comfyui" or "diffusers"."""
    path = next(iter(beside), "")
    if not path or path.startswith(names.PREFIXES):
        return "kohya"
    return "comfyui" if _COMFYUI_TEXT.match(path) else "diffusers"


def _flat(name: str) -> str:
    return name.replace(".", "_")
