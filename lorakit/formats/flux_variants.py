"""Two spellings of Flux' LoRAs that are like no other's, in ComfyUI's keys: XLabs' processors, and BFL's control LoRAs.

    double_blocks.0.processor.qkv_lora1.down.weight, .up.weight     1: the picture's, 2: the text's; also proj_lora1
    single_blocks.0.processor.qkv_lora.down.weight                  of q, k and v alone; proj_lora of the last layer
    double_blocks.0.img_attn.qkv.lora_B.bias                        BFL: beside lora_A and lora_B, added to the bias
    double_blocks.0.img_attn.norm.query_norm.scale                  BFL: trained whole, in place of the base's

Neither has an alpha: the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import AdapterError

_XLABS = re.compile(
    r"(?P<front>.*?)(?P<kind>double|single)_blocks\.(?P<block>\d+)\.processor\."
    r"(?P<what>qkv|proj)_lora(?P<side>[12]?)\.(?P<way>down|up)\.weight"
)
_NORM = re.compile(
    r"(?P<kind>double|single)_blocks\.(?P<block>\d+)\.(?P<side>(img_attn|txt_attn)\.)?norm\.(?P<which>query|key)_norm\.scale"
)
_BIAS = ".lora_B.bias"


def fits(keys: Iterable[str]) -> bool:
    """Whether a file is of one of these."""
    return any(_XLABS.fullmatch(key) or _NORM.search(key) for key in keys)


def plain(where: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors by ComfyUI's keys, weights saved whole by diffusers' names). AdapterError for a strange key."""
    found: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        norm = _NORM.search(key)
        if norm is not None:
            saved[_norm(norm)] = tensor
        elif key.endswith(_BIAS):
            found[key.removesuffix(_BIAS) + ".diff_b"] = tensor
        elif (match := _XLABS.fullmatch(key)) is not None:
            found |= _xlabs(where, key, match, tensor)
        else:
            found[key] = tensor
    return found, saved


def _xlabs(where: Path, key: str, match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    block, way, front = match["block"], f"lora_{match['way']}.weight", match["front"]
    if match["kind"] == "double":
        stream = {"1": "img", "2": "txt"}.get(match["side"])
        if stream is None:
            raise AdapterError(f"{where}: key '{key}': expected qkv_lora1, qkv_lora2, proj_lora1 or proj_lora2")
        return {f"{front}double_blocks.{block}.{stream}_attn.{match['what']}.{way}": tensor}
    if match["what"] == "proj":
        return {f"{front}single_blocks.{block}.linear2.{way}": tensor}
    names = [f"{front}single_transformer_blocks.{block}.attn.to_{x}.{way}" for x in "qkv"]
    if match["way"] == "down":
        return {name: tensor.clone() for name in names}
    if tensor.shape[0] % 3:
        raise AdapterError(f"{where}: key '{key}' has {tensor.shape[0]} rows; expected as many for q, k and v each")
    return {name: part.clone() for name, part in zip(names, tensor.chunk(3))}


def _norm(match: re.Match[str]) -> str:
    """diffusers' name of a block's norm of queries or keys."""
    added = "added_" if match["side"] == "txt_attn." else ""
    blocks = "transformer_blocks" if match["kind"] == "double" else "single_transformer_blocks"
    return f"transformer.{blocks}.{match['block']}.attn.norm_{added}{match['which'][0]}.weight"
