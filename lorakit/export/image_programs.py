"""Which keys of a written file an image program reads: its own lookup, without a model, in the published names.

    ComfyUI     a key's path is in a table made from the model's state dict (comfy/lora.py, model_lora_keys_unet and
                model_lora_keys_clip): lora_unet_<original name, flat>, diffusion_model.<original name>, and diffusers'
                names for some families; lora_te1_..., text_encoders.clip_l....
    A1111       diffusers' flat names of SD1 and SD2 turned into the original ones, the original flat names of SDXL and
                SD3 (extensions-builtin/Lora/networks.py); no other family
    diffusers   the components that the family's pipeline loads (loaders/lora_pipeline.py)

A path that is not there is passed over with a line in a log at most, so it is found here, before a file leaves.
`formats.names` has the names; where a program expects which of them is written down here again, apart from the writers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from ..adapter.adapter import Adapter
from ..errors import AdapterError, listing
from ..formats import names
from ..formats.bundled import token_and_part
from ..formats.kohya import written_for
from ..formats.spellings import NATIVE

PROGRAMS = ("comfyui", "a1111", "diffusers")
SEPARATE_TOKENS = {  # programs that read textual-inversion embeddings from files of their own, and how
    "comfyui": "copy it to ComfyUI/models/embeddings and write embedding:{stem} in the prompt",
    "diffusers": "pipe.load_textual_inversion('{file}')",
}
_SUFFIX = re.compile(
    r"\.(lora_(up|down|mid|A|B)\.weight|lora_linear_layer\.(up|down)\.weight|lora_magnitude_vector(\.weight)?|alpha"
    r"|dora_scale|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)|diff|diff_b|w_norm|b_norm)$"
)
_CLIP = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_UNETS = ("sd1", "sd2", "sdxl")
# Families whose names in ComfyUI are the original ones of our lists; of others it is not known what it reads.
_COMFYUI = (
    *(*_UNETS, "sd3", "flux", "flux2", "wan", "qwen_image", "z_image", "hunyuan_video", "chroma", "ltx", "ltx2"),
    *("lumina2", "hidream", "cosmos", "ace_step", "auraflow", "kandinsky5"),
)
# Families whose ComfyUI table also has `transformer.` and `lycoris_` in front of diffusers' names.
_DIFFUSERS_NAMES = ("sd3", "flux", "chroma", "auraflow", "qwen_image", "z_image", "hidream", "kandinsky5")
_LOADED = {  # diffusers' text encoders that LoRAs go into; the others' pipelines load a denoiser alone
    "sd1": ("text_encoder",),
    "sd2": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),
}


@dataclass(frozen=True)
class Placed:
    """`read`: component -> how many of the file's modules the program finds in it; `unread`: paths it passes over."""

    read: Mapping[str, int]
    unread: list[str]

    def __str__(self) -> str:
        texts = sum(n for component, n in self.read.items() if component.startswith("text_encoder"))
        denoiser = sum(self.read.values()) - texts
        return f"{denoiser} modules of the denoiser, {texts} of text encoders"


def format_for(program: str, format: str, adapter: Adapter) -> str:
    """The format to write: `format`, or for ComfyUI its own dotted one where kohya's flat names are not enough, which
    is all but the oldest families.
    """
    model = written_for(adapter)
    own_names = any(module.startswith(f"{NATIVE}.") for module in adapter.updates)
    dotted = own_names or (model is not None and model not in names.MODELS)
    return "comfyui" if program == "comfyui" and dotted else format


def token_notes(program: str, adapter: Adapter, files: Mapping[str, Iterable[str]]) -> list[str]:
    """How to use the tokens' own files, one line each. `files`: name -> its tensors (`bundled.own_files`)."""
    two = any(token_and_part(name)[1] for name in adapter.embeddings)
    how = SEPARATE_TOKENS[program]
    if two and program == "diffusers":
        how = (
            "pipe.load_textual_inversion, its clip_l and clip_g each with the text encoder and tokenizer that it is for"
        )
    lines = []
    for file, keys in files.items():
        own = next((f"the token '{key}'" for key in keys if key in adapter.embeddings), "a token")
        lines.append(f"{own} is in {file}: " + how.format(file=file, stem=file.removesuffix(".safetensors")))
    return lines


def placed(program: str, model: str | None, keys: Iterable[str]) -> Placed | None:
    """What `program` (one of `PROGRAMS`) reads of a file with these keys for a model of `names.KNOWN`; None where it is
    not known. AdapterError for a family that the program has no code for.
    """
    if program not in PROGRAMS or model is None or (program == "comfyui" and model not in _COMFYUI):
        return None
    if program == "a1111" and model not in (*_UNETS, "sd3"):
        raise AdapterError(
            f"A1111 has no {model}\n  export it for ComfyUI (--for comfyui) or diffusers (--for diffusers)"
        )
    find = {"comfyui": _comfyui, "a1111": _a1111, "diffusers": _diffusers}[program](model)
    paths, unread = set(), []
    for key in keys:
        if key.startswith("bundle_emb."):
            unread += [] if program == "a1111" else [key]
            continue
        match = _SUFFIX.search(key)
        if match is None:
            unread.append(key)
        else:
            paths.add(key[: match.start()])
    found = {path: find(path) for path in sorted(paths)}
    read = Counter(component for component in found.values() if component is not None)
    return Placed(dict(read), [*unread, *(path for path, component in found.items() if component is None)])


def check(program: str, model: str | None, keys: Iterable[str]) -> Placed | None:
    """As `placed`. AdapterError that lists what the program would pass over."""
    result = placed(program, model, keys)
    if result is not None and result.unread:
        unread, total = result.unread, sum(result.read.values()) + len(result.unread)
        raise AdapterError(
            f"{program} would not read {len(unread)} of the file's {total} entries: {listing(unread, 4)}\n"
            "  leave those modules out (lorakit edit --drop), or merge them into the base: lorakit merge"
        )
    return result


Find = Callable[[str], str | None]  # a key's path -> the component in which the program finds its module


@cache
def _comfyui(model: str) -> Find:
    table: dict[str, str] = {}
    for component, part in names.PIPELINES[model].items():
        if component.startswith("text_encoder"):
            table |= dict.fromkeys(_comfyui_text(component, part), component)
            continue
        listed = names.module_list(part.listed)
        original = listed.get("ldm") or listed["modules"]
        for name in original:
            table |= dict.fromkeys((f"diffusion_model.{name}", f"lora_unet_{_flat(name)}"), component)
        for name in listed["modules"]:
            if model in _UNETS:
                table |= dict.fromkeys((f"lora_unet_{_flat(name)}", f"lycoris_{_flat(name)}"), component)
            if model in _DIFFUSERS_NAMES:
                table |= dict.fromkeys((f"transformer.{name}", f"lycoris_{_flat(name)}"), component)
            if model == "z_image":  # its own weights are fused, and diffusers' names of their parts are mapped
                table[f"diffusion_model.{name}"] = component
    return table.get


def _comfyui_text(component: str, part: names.Component) -> list[str]:
    modules = names.module_list(part.listed)["modules"]
    if part.listed == "t5":
        return [front + _flat(name) for name in modules for front in ("lora_te3_", "lora_te2_")] + [
            f"text_encoders.t5xxl.transformer.{name}" for name in modules
        ]
    inside = [name for name in modules if _CLIP.fullmatch(name)]
    second = component.endswith("_2")
    fronts = ("lora_te2_",) if second else ("lora_te_", "lora_te1_")
    native = f"text_encoders.{'clip_g' if second else 'clip_l'}.transformer."
    dotted = [front + name for name in inside for front in (f"{component}.", native)]
    return [front + _flat(name) for name in inside for front in fronts] + dotted


@cache
def _a1111(model: str) -> Find:
    table: dict[str, str] = {}
    for component, part in names.PIPELINES[model].items():
        listed = names.module_list(part.listed)
        if component == "text_encoder_3":
            continue
        if component.startswith("text_encoder"):
            front = "lora_te_" if model in ("sd1", "sd2") else f"lora_te{2 if component.endswith('_2') else 1}_"
            inside = [name for name in listed["modules"] if _CLIP.fullmatch(name)]
            table |= {front + _flat(name): component for name in inside}
            continue
        known = listed["modules"] if model in ("sd1", "sd2") else listed["ldm"]
        table |= {f"lora_unet_{_flat(name)}": component for name in known}
    return table.get


@cache
def _diffusers(model: str) -> Find:
    parts, texts = names.PIPELINES[model], _LOADED.get(model, ())
    loaded = {c: names.module_list(p.listed)["modules"] for c, p in parts.items() if c in texts or "text" not in c}
    if model == "wan":
        loaded["transformer_2"] = loaded["transformer"]

    def find(path: str) -> str | None:
        component, _, name = path.partition(".")
        return component if name in loaded.get(component, ()) else None

    return find


def _flat(name: str) -> str:
    return name.replace(".", "_")
