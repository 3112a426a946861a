"""A transformers checkpoint folder: its config, and where in its safetensors files each tensor lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LorakitError, did_you_mean, listing
from ..formats.files import read_json
from ..formats.stream import MERGEABLE, Slot, read_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Base:
    """A checkpoint folder, opened but not read."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Slot]
    shards: Mapping[str, Mapping[str, str]]  # file name -> its header's metadata
    index: Mapping[str, Any] | None  # the index file of a sharded checkpoint

    @property
    def architecture(self) -> str | None:
        return next(iter(self.config.get("architectures") or ()), None)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that holds most of its bytes."""
        total: dict[torch.dtype, int] = {}
        for slot in self.tensors.values():
            if slot.dtype in MERGEABLE and slot.torch_dtype is not None:
                total[slot.torch_dtype] = total.get(slot.torch_dtype, 0) + slot.nbytes
        return max(total, key=lambda d: total[d], default=torch.float32)


def open_base(folder: Path) -> Base:
    """Read a folder's config and headers. LorakitError for what is no checkpoint, is quantized, or is stored as pickles."""
    if not folder.exists():
        here = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise LorakitError(
            f"there is no checkpoint folder '{folder}'{did_you_mean(folder.name, here)}\n"
            "  merging works on files: fetch a hub model first (hf download NAME --local-dir FOLDER)"
        )
    if not folder.is_dir():
        raise LorakitError(f"{folder} is a file; expected a checkpoint folder (config.json and safetensors files)")
    if not (folder / CONFIG).exists():
        hint = "; it holds an adapter (adapter_config.json): give its base first" if (folder / "adapter_config.json").exists() else ""
        raise LorakitError(f"{folder} is no checkpoint folder: {CONFIG} is missing{hint}")
    config = read_json(folder / CONFIG)
    _refuse_quantized(folder, config)
    if (folder / SINGLE).exists():
        slots, metadata = read_header(folder / SINGLE)
        return Base(folder, config, slots, {SINGLE: metadata}, None)
    if (folder / INDEX).exists():
        return _open_sharded(folder, config)
    raise _no_safetensors(folder)


def _open_sharded(folder: Path, config: Mapping[str, Any]) -> Base:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LorakitError(f"{folder / INDEX} has no 'weight_map' (tensor name -> file)")
    tensors: dict[str, Slot] = {}
    shards: dict[str, Mapping[str, str]] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise LorakitError(f"{folder / INDEX} names {file!r}; expected safetensors files of the same folder")
        if not (folder / file).exists():
            raise LorakitError(f"{folder} is incomplete: {INDEX} names {file}, which is missing\n  fetch the checkpoint again")
        slots, shards[file] = read_header(folder / file)
        twice = [name for name in slots if name in tensors]
        if twice:
            raise LorakitError(f"{folder}: tensor '{twice[0]}' is in {tensors[twice[0]].path.name} and in {file}")
        tensors |= slots
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise LorakitError(f"{folder} is incomplete: {INDEX} lists tensors that its files do not hold: {listing(lost, 3)}")
    return Base(folder, config, tensors, shards, index)


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            how = part["quantization_config"]
            method = how.get("quant_method", "quantized") if isinstance(how, dict) else how
            raise LorakitError(
                f"{folder} is quantized ({method}): a low-rank update added to rounded weights is mostly lost\n"
                "  merge into the unquantized base, and quantize the result"
            )


def _no_safetensors(folder: Path) -> LorakitError:
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth") and p.name.startswith(("pytorch_model", "model"))
    )
    if pickles:
        return LorakitError(
            f"{folder} holds its weights as pickles ({listing(pickles, 2)}); merging reads safetensors\n"
            "  convert it once:\n"
            f"  python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained({json.dumps(str(folder))[1:-1]!r}, dtype='auto')"
            ".save_pretrained('converted')\"\n"
            "  and copy its tokenizer files beside it"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors")) + sorted(p.name for p in folder.glob("*.gguf"))
    there = f"; it holds {listing(others, 3)}" if others else ""
    return LorakitError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there{there}")
