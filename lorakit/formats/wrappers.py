"""What wrappers leave in the names of an adapter's keys, and the names without it.

    torch.compile                   _orig_mod.                     anywhere
    FSDP, activation checkpoints    _fsdp_wrapped_module.  _fpw_module.  _checkpoint_wrapped_module.      anywhere
    Lightning Fabric, Opacus        _forward_module.  _module.     anywhere
    DDP, DeepSpeed, DataParallel    module.                        in front of all keys
    PEFT                            base_model.model.              in front: PEFT's own spelling, which is kept
                                    base_model.model. behind another name (transformer.base_model.model., of
                                    SimpleTuner), or twice
    PEFT's state dict               lora_A.default.weight          the adapter's name
    TRL, Lightning, own classes     a first name before base_model.model.

No receiver finds such modules in its model, so they are read without, and that is said in one line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import AdapterError, listing
from ..io.tensors import keys_of, read_tensors

PEFT = "base_model.model."
_ANYWHERE = re.compile(r"(?:^|(?<=\.))_(?:orig_mod|fpw_module|forward_module|module|\w*wrapped_module)\.")
_FLAT = re.compile(r"(?<=_)_orig_mod_")  # kohya's underscores: lora_unet_blocks_0__orig_mod_attn
_NAMED = re.compile(r"(?<=\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)([^.]+)(?=\.|$)")
# Names that say which part of a pipeline it is, and are no wrapper.
_PARTS = re.compile(r"(unet|transformer(_\d+)?|text_encoder(_\d+)?|prior|diffusion_model|model\.diffusion_model)\.")
Value = TypeVar("Value")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
log = logging.getLogger(__name__)


def unwrap(keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """({key: key without wrappers}, what was taken away, for people). Nothing is taken from keys without wrappers."""
    found = {key: key for key in keys}
    removed: list[str] = []

    def change(what: str, new: dict[str, str]) -> None:
        if any(new[key] != found[key] for key in found):
            removed.append(what)
            found.update(new)

    for pattern in (_ANYWHERE, _FLAT):
        taken = sorted({match[0].strip("._") for key in found for match in pattern.finditer(key)})
        if taken:
            change(", ".join(f"_{name}" for name in taken), {k: pattern.sub("", name) for k, name in found.items()})
    change("module", _without_module(found))
    change("base_model.model behind another name", {k: _without_inner_peft(n) for k, n in found.items()})
    change("module", _without_module(found))
    adapters = {match[2] for name in found.values() for match in _NAMED.finditer(name)}
    if len(adapters) == 1:
        plain = {k: _NAMED.sub(r"\1", n) for k, n in found.items()}
        if len(set(plain.values())) == len(plain):  # else two tensors of one name, which the reader tells
            change(f"the adapter's name {adapters.pop()}", plain)
    elif adapters:
        raise AdapterError(
            f"its keys hold {len(adapters)} adapters: {listing(sorted(adapters))}\n"
            "  expected one a file: save them apart (PEFT: save_pretrained(..., selected_adapters=[...]))"
        )
    return found, removed


def unwrapped(where: Path, tensors: dict[str, Value]) -> dict[str, Value]:
    """The same under names without wrappers, with a line in the log. AdapterError where two keys become one."""
    try:
        renamed, removed = unwrap(tensors)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error
    if not removed:
        return tensors
    found: dict[str, Value] = {}
    for key, value in tensors.items():
        if renamed[key] in found:
            raise AdapterError(f"{where}: key '{key}' is a second '{renamed[key]}' without what wrappers left in it")
        found[renamed[key]] = value
    log.warning("%s: read without what wrappers left in its key names: %s", where, listing(dict.fromkeys(removed)))
    return found


def read_unwrapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by names without wrappers, the header). AdapterError, as `io.tensors.read_tensors`."""
    tensors, header = read_tensors(path)
    # Numbers of 8 bits are held in 16, which hold each of them exactly; torch has no arithmetic for 8.
    wide = {key: t.to(torch.float16) if t.dtype in _FLOAT8 else t for key, t in tensors.items()}
    return unwrapped(path, wide), header


def keys_unwrapped(path: Path) -> list[str]:
    """The names of a file's tensors, without wrappers."""
    try:
        return list(dict.fromkeys(unwrap(keys_of(path))[0].values()))
    except AdapterError as error:
        raise error if str(path) in str(error) else AdapterError(f"{path}: {error}") from error


def _without_module(found: dict[str, str]) -> dict[str, str]:
    """Without DDP's level, if all keys have it, behind PEFT's prefix or a pipeline part's name."""
    cut: dict[str, str] = {}
    for key, name in found.items():
        front = PEFT if name.startswith(PEFT) else (m[0] if (m := _PARTS.match(name)) else "")
        rest = name[len(front) :]
        if not rest.startswith("module."):
            return found
        while rest.startswith("module."):
            rest = rest.removeprefix("module.")
        cut[key] = front + rest
    return cut


def _without_inner_peft(name: str) -> str:
    """base_model.model. at the front once; elsewhere not at all, nor what its owner called the wrapped model."""
    before, inner, rest = name.rpartition(PEFT)
    if not inner or not before:
        return name
    part = _PARTS.match(before.removeprefix(PEFT))
    return (part[0] if part else PEFT) + rest
