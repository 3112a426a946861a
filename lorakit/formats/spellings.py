"""Parse the keys of a LoRA in files with dotted module paths, in all spellings.

    <path>.lora_A.weight, .lora_B.weight                            PEFT; diffusers, ai-toolkit, SimpleTuner, ComfyUI
                                                                    today
    <path>.lora_A.default.weight                                    PEFT's own state dict, with the adapter's name
    <path>.lora.down.weight, .lora.up.weight                        diffusers' UNet and DiT before PEFT
    <path>.lora_linear_layer.down.weight, .up.weight                diffusers' text encoders before PEFT
    <attention>.processor.to_q_lora.down.weight, .up.weight         diffusers' attention processors of early 2023
    <path>.lora_down.weight, .lora_up.weight, .lora_mid.weight      kohya's suffixes behind a dotted path (OneTrainer)
    <path>.alpha  ·  .dora_scale, .lora_magnitude_vector            and LyCORIS' suffixes: .hada_w1_a, .lokr_w1, .diff,
                                                                    ...

A path starts with the pipeline's component ("unet.", "transformer.", "text_encoder."...). Files of a single model have
no prefix, PEFT's "base_model.model." or ComfyUI's "diffusion_model."; then the first part of the path identifies the
model.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from ..module_names import is_language_trunk
from . import names
from .lycoris import DENSE, LOHA, LOKR

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "prior",
)
# PEFT's of DoRA, [out] or [1, out, 1...]; LyCORIS' dora_scale is [out, 1...] or [1, in, 1...]
MAGNITUDE = "lora_magnitude_vector"
NATIVE = "diffusion_model"  # ComfyUI's: paths as the model's first publisher named its modules

# First parts of module paths that only one diffusers model has.
_FIRST = {
    "unet": ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"),
    "transformer": (
        "transformer_blocks",
        "single_transformer_blocks",
        "context_embedder",
        "x_embedder",
        "time_text_embed",
    ),
    "text_encoder": ("text_model",),
}
_COMPONENT_OF = {first: component for component, names in _FIRST.items() for first in names}
# Language models whose trunk is also called "transformer".
_LANGUAGE_MODEL = re.compile(r"transformer\.(h\.|wte|wpe|word_embeddings|encoder\.layers\.|layers\.)")

_KEY = re.compile(
    r"(?P<path>.+?)(?:"
    r"\.lora_(?P<AB>[AB])(?:\.[^.]+)?\.weight"
    r"|(?P<old>[._]lora|\.lora_linear_layer)\.(?P<way>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)(?:\.[^.]+)?\.weight"
    r"|(?:[._]lora|\.lora_linear_layer)?\.(?P<alpha>alpha)"
    r"|\.(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?|dora_scale)"
    rf"|\.(?P<lycoris>{'|'.join((*LOHA, *LOKR, *DENSE, 'scalar'))})"
    r")"
)
_OLD_TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# CLIP's layers in transformers 5; in earlier versions, and in files, they are below `text_model`.
_CLIP_LAYER = re.compile(r"encoder\.layers\.\d+\.(self_attn|mlp|layer_norm\d)\b")


class Name(NamedTuple):
    """A parsed key: the tensor, its module, and the component (None if the key does not identify it)."""

    component: str | None
    path: str
    suffix: str  # as kohya spells it: "lora_down.weight" (`lycoris.SUFFIXES`), or MAGNITUDE
    prefixed: bool  # whether the key names the component; else it follows from the path's first part


def split(key: str) -> tuple[str, str] | None:
    """(path as it is written, suffix as kohya spells it), or None if it is no spelling of a LoRA's tensor."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match["path"], _suffix(match))


def parse(key: str) -> Name | None:
    """Parse a key; None if it is no LoRA's tensor in a known spelling."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    component, path, prefixed = _component(match["path"].removeprefix("base_model.model."))
    path = path.replace(".processor.", ".")
    if (component or "").startswith("text_encoder"):
        head, _, last = path.rpartition(".")
        path = f"{head}.{_OLD_TEXT_ENCODER.get(last, last)}" if head.endswith(".self_attn") else path
        path = f"text_model.{path}" if _CLIP_LAYER.match(path) else path
    elif path.endswith(".to_out") and (match["old"] == "_lora" or component == "unet"):
        path += ".0"  # to_out is a list of a linear layer and a dropout
    return Name(component, path, _suffix(match), prefixed)


def is_spelling(key: str) -> bool:
    """Whether a key is a tensor of a diffusion model's adapter, in any spelling with a dotted path."""
    name = parse(key)
    return name is not None and name.component is not None


def component_of_first(first: str) -> str | None:
    """The component whose models alone have modules whose path begins with `first`; None if there is none."""
    return _COMPONENT_OF.get(first)


def _component(path: str) -> tuple[str | None, str, bool]:
    """(component, path within it, whether the key names the component)."""
    first, _, rest = path.partition(".")
    if (_LANGUAGE_MODEL.match(path) or is_language_trunk(path)) and path not in _listed():
        return None, path, False
    if first in COMPONENTS and rest:
        return first, rest, True
    if first == NATIVE and rest:
        return _COMPONENT_OF.get(rest.split(".")[0], NATIVE), rest, True
    return _COMPONENT_OF.get(first), path, False


@cache
def _listed() -> frozenset[str]:
    """The modules of diffusion transformers whose blocks are called `layers`, as language models' are."""
    return frozenset(m for model in names.KNOWN for m in names.shapes(model) if m.startswith("transformer.layers."))


def _suffix(match: re.Match[str]) -> str:
    if match["magnitude"]:
        return "dora_scale" if match["magnitude"] == "dora_scale" else MAGNITUDE
    way = {"A": "down", "B": "up"}.get(match["AB"]) or match["way"] or match["kohya"]
    return f"lora_{way}.weight" if way else match["alpha"] or match["lycoris"]
