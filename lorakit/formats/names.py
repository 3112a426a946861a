"""Module names of the diffusion models, and the key of a kohya file for each of them.

A kohya key is the component's prefix and a module's name with underscores for dots. The name cannot be recovered by
splitting ("to_out_0", "proj_in"), so keys are looked up in `names/*.json`: the module names of diffusers' and
transformers' classes with their weights' shapes ("modules"), and the original code's names for the same weights ("ldm";
one such name, like "attn.qkv", may stand for several modules in order). scripts/make_name_lists.py writes these files.

    model   denoiser, as written                     text encoders, as written
    sd1     lora_unet_ + diffusers' names            lora_te_   CLIP-L
    sd2     lora_unet_ + diffusers' names            lora_te_   OpenCLIP-H
    sdxl    lora_unet_ + ldm names                   lora_te1_  CLIP-L, lora_te2_ CLIP-G
    sd3     lora_unet_ + ldm names                   lora_te1_  CLIP-L, lora_te2_ CLIP-G, lora_te3_ T5
    flux    lora_unet_ + ldm names                   lora_te1_  CLIP-L, lora_te3_ T5

    others  lora_unet_ + ldm names, or diffusers' where trainers have those (`ldm=False`); denoiser alone

Read are both namings of every denoiser, under any of the prefixes in use. In the lists of the others a name stands for
all blocks: "blocks.{40}.attn1.to_q" for the numbers 0 to 39.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter

FOLDER = Path(__file__).with_name("names")
UNET, TRANSFORMER = ("lora_unet_", "lycoris_"), ("lora_unet_", "lora_transformer_", "lycoris_")


class Component(NamedTuple):
    """A pipeline's component. `listed`: its file in names/; `prefixes`: of its keys, the first is written; `ldm`:
    whether ldm names are written.
    """

    listed: str
    prefixes: tuple[str, ...]
    ldm: bool = False


class KohyaKey(NamedTuple):
    """A key of a kohya file, and the modules that it stands for, in order."""

    key: str
    modules: tuple[str, ...]


_CLIP = Component("clip_l", ("lora_te1_", "lora_te_"))
_ONE_CLIP = ("lora_te_", "lora_te1_")
PIPELINES = {
    "sd1": {"unet": Component("sd1", UNET), "text_encoder": Component("clip_l", _ONE_CLIP)},
    "sd2": {"unet": Component("sd2", UNET), "text_encoder": Component("clip_h", _ONE_CLIP)},
    "sdxl": {
        "unet": Component("sdxl", UNET, ldm=True),
        "text_encoder": _CLIP,
        "text_encoder_2": Component("clip_g", ("lora_te2_",)),
    },
    "sd3": {
        "transformer": Component("sd3", TRANSFORMER, ldm=True),
        "text_encoder": _CLIP,
        "text_encoder_2": Component("clip_g", ("lora_te2_",)),
        "text_encoder_3": Component("t5", ("lora_te3_",)),
    },
    # T5 is the pipeline's second text encoder, and lora_te3_ all the same: ComfyUI looks for it there.
    "flux": {
        "transformer": Component("flux", TRANSFORMER, ldm=True),
        "text_encoder": _CLIP,
        "text_encoder_2": Component("t5", ("lora_te3_", "lora_te2_")),
    },
}
MODELS = tuple(PIPELINES)  # with text encoders, and as single files
# Denoisers alone. ldm=False: trainers take diffusers' own classes, or the original names are the same.
_DIFFUSERS_NAMES = {
    *(
        "qwen_image",
        "z_image",
        "hidream",
        "cogvideox",
        "cogview4",
        "mochi",
        "sana",
        "kandinsky5",
        "ernie_image",
        "fibo2",
    )
}
UNFUSED = {"z_image"}  # ComfyUI has fused weights, and takes diffusers' names of their parts
_DENOISERS = (  # where names and widths fit several, the first counts
    *("flux2", "wan", "qwen_image", "z_image", "hunyuan_video", "chroma", "ltx", "ltx2", "lumina2", "hidream"),
    *("cosmos", "ideogram4", "krea2", "ace_step", "minimax_h3", "flux3", "auraflow", "cogvideox", "cogview4", "mochi"),
    *("sana", "kandinsky5", "ernie_image", "fibo2"),
)
PIPELINES |= {
    model: {"transformer": Component(model, TRANSFORMER, ldm=model not in _DIFFUSERS_NAMES)} for model in _DENOISERS
}
KNOWN = tuple(PIPELINES)
_WIDTHS = {"flux": (3072,), "sd3": (1536, 2432)}  # of the other lists each has its own
PREFIXES = tuple(
    sorted({prefix for parts in PIPELINES.values() for part in parts.values() for prefix in part.prefixes})
)

# Modules whose weight has two halves, shift and scale, which the original code stores in the other order.
_CONTINUOUS_NORMS = {
    "flux": ("norm_out.linear",),
    "sd3": ("norm_out.linear", *(f"transformer_blocks.{i}.norm1_context.linear" for i in (23, 37))),
}


@cache
def module_list(name: str) -> dict[str, dict]:
    """One of the lists: {"modules": {name: shape}, "ldm": {the original code's name: modules}}, and of those in counted
    form "widths": the hidden sizes of the published models, and "swapped": names of modules (see `swaps_halves`).
    """
    listed = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf8"))
    modules = {each: shape for pattern, shape in listed["modules"].items() for each in _numbered(pattern)}
    ldm: dict[str, list[str]] = {}
    for pattern, parts in listed.get("ldm", {}).items():
        ldm |= zip(_numbered(pattern), map(list, zip(*map(_numbered, parts), strict=True)), strict=True)
    return listed | {"modules": modules} | ({"ldm": ldm} if ldm else {})


_COUNT = re.compile(r"\{(\d+)\}")


def _numbered(pattern: str) -> list[str]:
    """ "blocks.{2}.norm" -> ["blocks.0.norm", "blocks.1.norm"]; a name without a count is itself."""
    found = _COUNT.search(pattern)
    return [pattern] if found is None else [_COUNT.sub(str(i), pattern) for i in range(int(found[1]))]


@cache
def widths(model: str) -> tuple[int, ...]:
    """The hidden sizes of a transformer's published models, the listed one first; nothing for a UNet."""
    if model in MODELS:
        return _WIDTHS.get(model, ())
    return tuple(module_list(PIPELINES[model]["transformer"].listed)["widths"])


@cache
def shapes(model: str) -> Mapping[str, tuple[int, ...]]:
    """The shape of each module's weight, by the module's name with its component in front ("unet.conv_in"): that of the
    model whose width is the first of the list's `widths`.
    """
    return {
        f"{component}.{name}": tuple(shape)
        for component, part in PIPELINES[model].items()
        for name, shape in module_list(part.listed)["modules"].items()
    }


@cache
def modules_of(model: str) -> Mapping[str, tuple[str, ...]]:
    """Kohya key without suffix -> the modules it stands for, for every prefix and naming in use."""
    found: dict[str, tuple[str, ...]] = {}
    for component, part in PIPELINES[model].items():
        listed = module_list(part.listed)
        for prefix in part.prefixes:
            for name in listed["modules"]:
                found[prefix + _flat(name)] = (f"{component}.{name}",)
                # transformers 5 has no such level, and what is named after its class has none
                if name.startswith("text_model."):
                    found[prefix + _flat(name.removeprefix("text_model."))] = (f"{component}.{name}",)
            for name, modules in listed.get("ldm", {}).items():
                found[prefix + _flat(name)] = tuple(f"{component}.{module}" for module in modules)
    return found


@cache
def places(model: str, prefix: str | None = None, original: bool | None = None) -> Mapping[str, KohyaKey]:
    """Module name -> the key that it is written under. A module without an ldm name where those are written has none.

    prefix, original: of the denoiser's keys in a file that is written back as it was read: its prefix, and whether it
    had the original code's names; a module that has no such name is then written under diffusers'.
    """
    found: dict[str, KohyaKey] = {}
    for number, (component, part) in enumerate(PIPELINES[model].items()):
        listed = module_list(part.listed)
        own = {name: [name] for name in listed["modules"]}
        keys = listed["ldm"] if part.ldm else own
        front = part.prefixes[0]
        if number == 0 and prefix is not None:
            front, keys = prefix, (own | listed.get("ldm", {}) if original else own)
        for name, modules in keys.items():
            full = tuple(f"{component}.{module}" for module in modules)
            found |= dict.fromkeys(full, KohyaKey(front + _flat(name), full))
    return found


# Beginnings of the names of diffusers' pipelines and denoisers; the longest that fits counts. UNets have one class.
_CLASSES = {
    "SD3": "sd3",
    "Flux": "flux",
    "Flux2": "flux2",
    "Flux3": "flux3",
    "Chroma": "chroma",
    "QwenImage": "qwen_image",
    "ZImage": "z_image",
    "Wan": "wan",
    "HunyuanVideo": "hunyuan_video",
    "LTX2": "ltx2",
    "LTX": "ltx",
    "Lumina2": "lumina2",
    "HiDream": "hidream",
    "AuraFlow": "auraflow",
    "CogVideoX": "cogvideox",
    "CogView4": "cogview4",
    "Mochi": "mochi",
    "Sana": "sana",
    "Kandinsky5": "kandinsky5",
}


def architecture_of(adapter: Adapter) -> str:
    """The class of the base that an adapter was trained on, "" if it does not say."""
    fingerprint = adapter.metadata.get("fingerprint")
    found = fingerprint.get("architecture") if isinstance(fingerprint, Mapping) else None
    return found if isinstance(found, str) else ""


def model_of_class(architecture: str) -> str | None:
    """The model that a pipeline's or denoiser's class is of ("FluxPipeline"); None if its name does not tell."""
    fitting = [start for start in _CLASSES if architecture.startswith(start)]
    return _CLASSES[max(fitting, key=len)] if fitting else None


def swaps_halves(model: str, key: str, module: str, size: tuple[int, int]) -> bool:
    """Whether the rows of a module's weight [out, in] have their halves swapped under this key, against diffusers.

    These norms compute a shift and a scale; one with more outputs (out > 2·in) is another kind of norm. A key with
    diffusers' own name of the module has diffusers' order.
    """
    name = module.partition(".")[2]
    if _flat(key).endswith(_flat(name)):
        return False
    if model not in MODELS:
        swapped = module_list(PIPELINES[model]["transformer"].listed).get("swapped", ())
        return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name, count=1) in swapped
    return name in _CONTINUOUS_NORMS.get(model, ()) and size[0] == 2 * size[1]


def candidates(modules: Iterable[str]) -> list[str]:
    """The models that have modules of all these names."""
    modules = list(modules)
    return [model for model in KNOWN if all(module in shapes(model) for module in modules)]


def model_of(modules: Iterable[str], sizes: Mapping[str, tuple[int, int]] | None = None) -> str | None:
    """Which diffusion model's modules these are, one of `KNOWN`, or None.

    SD1 and SD2 share their names and SDXL shares some of them. If several models fit, the one whose widths agree with
    most of `sizes` (module -> (out, in)), then the first of `MODELS`.
    """
    modules = list(modules)
    return likeliest(candidates(modules), sizes or {}) if modules else None


def likeliest(models: list[str], sizes: Mapping[str, tuple[int, int]], said: str | None = None) -> str | None:
    """The model whose widths agree with most of `sizes`; in a tie `said` (from a file's metadata), else the first. None
    if `models` is empty.
    """
    votes = Counter(
        {
            model: sum(shapes(model)[m][:2] == size for m, size in sizes.items() if m in shapes(model))
            for model in models
        }
    )
    best = [model for model in models if votes[model] == max(votes.values())]
    return said if said in best else next(iter(best), None)


def _flat(name: str) -> str:
    return name.replace(".", "_")
