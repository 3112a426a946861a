"""The files of an adapter's folder in PEFT's format, by their names in it.

adapter_config.json, adapter_model.safetensors, lorakit.json
prompt_encoder.safetensors            the encoder of virtual tokens       if lorakit.json names it
virtual_tokens/...                    virtual tokens beside a LoRA        if lorakit.json names it
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..io.json_object import parse_json, read_json
from ..io.stream import read_header
from .inside import OURS
from .peft_keys import CONFIG
from .peft_prompts import ENCODER, ENCODER_KEY, FOLDER, FOLDER_KEY
from .peft_shards import WEIGHTS

_IN_FOLDER = (CONFIG, WEIGHTS, OURS, ENCODER)  # of virtual tokens beside a LoRA, which are an adapter themselves
BESIDE = (ENCODER, *(f"{FOLDER}/{name}" for name in _IN_FOLDER))


def beside(names: Collection[str]) -> list[str]:
    """Return which of a folder's files are parts of an adapter with virtual tokens, beside its config and weights."""
    return [name for name in BESIDE if name in names]


def own_files(folder: Path) -> list[str]:
    """Return the names of the files that an adapter consists of, also of those that are missing.

    Raises AdapterError for JSON or a header that cannot be read.
    """
    ours = _named(folder)
    names = [CONFIG, WEIGHTS, OURS]
    if ENCODER_KEY in ours:
        names.append(ENCODER)
    if FOLDER_KEY in ours:
        inner = _named(folder / FOLDER)
        names += [f"{FOLDER}/{name}" for name in _IN_FOLDER if name != ENCODER or ENCODER_KEY in inner]
    return names


def read_ours(folder: Path, header: Mapping[str, str], weights: Path) -> dict[str, Any]:
    """Return what lorakit.json says, or the header of the weights without it. `weights`: the file to name in errors."""
    if (folder / OURS).exists():
        return read_json(folder / OURS)
    return parse_json(header.get("lorakit", "{}"), f"{weights} (its header)")


def _named(folder: Path) -> dict[str, Any]:
    weights = folder / WEIGHTS
    header = read_header(weights)[1] if weights.is_file() and not (folder / OURS).exists() else {}
    return read_ours(folder, header, weights)
