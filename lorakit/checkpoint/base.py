"""Open a checkpoint: its config, and the position of each tensor in its safetensors files. No weights are read.

transformers' folder       config.json, model.safetensors or model.safetensors.index.json and its shards
a diffusers component      the same, called diffusion_pytorch_model; either may have a variant in its name
                           (model.fp16.safetensors)
a single file              of a diffusion model, in the original code's names
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import LorakitError, did_you_mean, listing
from ..io.json_object import read_json
from ..io.stream import MERGEABLE, NAMES, Slot, read_header
from .quantized.found import StoredQuantization, quantization_of, with_weights
from .quantized.weight import PackedSlot

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_STEMS = ("model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Base:
    """An open checkpoint.

    `folder`: its path, also of a single file. `shards`: file name -> the metadata in its header. `index`, `index_name`:
    the index file of a sharded checkpoint. `single_file`: the diffusion model that a single file holds ("sd1", "flux":
    `lorakit.formats.names.MODELS`), else "". `component`: the component's name within a diffusers pipeline, else "".
    `quantization`: how it is quantized; its quantized weights are then among `tensors` as the weights they stand for.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Slot]
    shards: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None
    index_name: str = INDEX
    single_file: str = ""
    component: str = ""
    quantization: StoredQuantization | None = None

    @property
    def architecture(self) -> str | None:
        """transformers' class name, as the config states it."""
        return next(iter(self.config.get("architectures") or ()), None)

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture's family ("llama"); "" if the config has none."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: slot.shape for name, slot in self.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most of its bytes, without quantized weights; float32 if it has none."""
        total: dict[torch.dtype, int] = {}
        for slot in self.tensors.values():
            if slot.dtype in MERGEABLE and slot.torch_dtype is not None and not isinstance(slot, PackedSlot):
                total[slot.torch_dtype] = total.get(slot.torch_dtype, 0) + slot.nbytes
        return max(total, key=lambda d: total[d], default=torch.float32)

    @property
    def dequantized_dtype(self) -> torch.dtype:
        """The dtype that quantized weights are written in: the model's own if that has 16 bits, else bfloat16."""
        stated = getattr(torch, str(self.config.get("dtype") or self.config.get("torch_dtype")), None)
        own = stated if isinstance(stated, torch.dtype) else self.dtype
        return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16

    def dtype_in_out(self, slot: Slot, dtype: torch.dtype | None = None) -> str:
        """Return a file's name for the dtype that a tensor is written in. `dtype`: the one asked for all weights."""
        if dtype is not None and slot.dtype in MERGEABLE:
            return NAMES[dtype]
        return NAMES[self.dequantized_dtype] if isinstance(slot, PackedSlot) else slot.dtype


def open_base(folder: Path, quantized: bool = False) -> Base:
    """Read a folder's config and headers. `quantized`: whether quantized weights may be read, as the weights they stand
    for.

    Raises LorakitError if it is not a checkpoint, is stored as pickles, or is quantized in a format that cannot be
    read, or where that is not allowed.
    """
    if not folder.exists():
        here = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise LorakitError(
            f"there is no checkpoint folder '{folder}'{did_you_mean(folder.name, here)}\n"
            "  merging works on files: fetch a hub model first (hf download NAME --local-dir FOLDER)"
        )
    if not folder.is_dir():
        raise LorakitError(f"{folder} is a file; expected a checkpoint folder (config.json and safetensors files)")
    if not (folder / CONFIG).exists():
        hint = (
            "; it holds an adapter (adapter_config.json): give its base first"
            if (folder / "adapter_config.json").exists()
            else ""
        )
        raise LorakitError(f"{folder} is not a checkpoint folder: {CONFIG} is missing{hint}")
    config = read_json(folder / CONFIG)
    quantization = quantization_of(folder, config)
    if quantization is not None and not quantized:
        raise LorakitError(
            f"{folder} is quantized ({quantization.kind}): its weights are rounded, and this needs those before\n"
            "  give the unquantized checkpoint"
        )
    # the latter: diffusers' own config
    single, index = _weights_of(folder, _STEMS[::-1] if "_class_name" in config else _STEMS)
    if single is not None:
        slots, metadata = read_header(folder / single)
        base = Base(folder, config, slots, {single: metadata}, None)
    elif index is not None:
        base = _open_sharded(folder, config, index)
    else:
        raise _no_safetensors(folder)
    if quantization is None:
        return base
    tensors = with_weights(folder, base.tensors, quantization, base.model_type)
    return replace(base, tensors=tensors, quantization=quantization)


def open_single_file(path: Path) -> Base:
    """Read the header of a diffusion model's single file. Raises LorakitError for anything else."""
    from .single_file import model_of_file

    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            raise LorakitError(
                f"{path} is a GGUF file, whose weights are rounded for one program: merging reads safetensors\n"
                "  merge into the model it was made from (lorakit export --merged --for llama.cpp writes a GGUF of the "
                "result)"
            )
    if path.suffix != ".safetensors":
        raise LorakitError(
            f"{path} is not a safetensors file; expected a checkpoint folder, or a diffusion model's single "
            ".safetensors file"
        )
    slots, metadata = read_header(path)
    try:
        model = model_of_file({name: slot.shape for name, slot in slots.items()})
    except LorakitError as error:
        raise LorakitError(f"{path}: {error}") from error
    return Base(path, {}, slots, {path.name: metadata}, None, single_file=model)


def _weights_of(folder: Path, stems: Sequence[str]) -> tuple[str | None, str | None]:
    """Return (file with all weights or None, index of several files or None). Raises LorakitError if the folder has
    several variants (fp16, ...).
    """
    for stem in stems:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if (folder / single).exists() or (folder / index).exists():
            return (single, None) if (folder / single).exists() else (None, index)
        variants = [p.name for p in folder.glob(f"{stem}.*.safetensors") if "-of-" not in p.name]
        indices = [p.name for p in folder.glob(f"{stem}.safetensors.index.*.json")]
        if len(variants) + len(indices) > 1:
            raise LorakitError(
                f"{folder} holds several variants of its weights: {listing(sorted((*variants, *indices)), 4)}\n"
                "  keep one of them there"
            )
        if variants or indices:
            return (variants[0], None) if variants else (None, indices[0])
    return None, None


def without_variant(file: str) -> str:
    """Return the file name without its variant: model.fp16.safetensors -> model.safetensors; shards and indices
    likewise.
    """
    stem, _, rest = file.partition(".safetensors")
    name = next((s for s in _STEMS if stem.startswith((f"{s}.", f"{s}-"))), None)
    if name is None:
        return re.sub(r"\.index\.[^.]+\.json$", ".index.json", file)
    shard = re.search(r"-\d+-of-\d+", stem)
    return f"{name}{shard[0] if shard else ''}.safetensors" + re.sub(r"\.index\.[^.]+\.json$", ".index.json", rest)


def _open_sharded(folder: Path, config: Mapping[str, Any], name: str) -> Base:
    index = read_json(folder / name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LorakitError(f"{folder / name} has no 'weight_map' (tensor name -> file)")
    tensors: dict[str, Slot] = {}
    shards: dict[str, Mapping[str, str]] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise LorakitError(f"{folder / name} names {file!r}; expected safetensors files of the same folder")
        if not (folder / file).exists():
            raise LorakitError(
                f"{folder} is incomplete: {name} names {file}, which is missing\n  fetch the checkpoint again"
            )
        slots, shards[file] = read_header(folder / file)
        twice = [tensor for tensor in slots if tensor in tensors]
        if twice:
            raise LorakitError(f"{folder}: tensor '{twice[0]}' is in {tensors[twice[0]].path.name} and in {file}")
        tensors |= slots
    missing = [tensor for tensor in weight_map if tensor not in tensors]
    if missing:
        raise LorakitError(
            f"{folder} is incomplete: {name} lists tensors that its files do not hold: {listing(missing, 3)}"
        )
    return Base(folder, config, tensors, shards, index, name)


def _no_safetensors(folder: Path) -> LorakitError:
    pickles = sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix in (".bin", ".pt", ".pth") and p.name.startswith(("pytorch_model", "model"))
    )
    if pickles:
        return LorakitError(
            f"{folder} holds its weights as pickles ({listing(pickles, 2)}); merging reads safetensors\n"
            "  convert it once:\n"
            '  python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({json.dumps(str(folder))[1:-1]!r}, dtype='auto')"
            ".save_pretrained('converted')\"\n"
            "  and copy its tokenizer files there too"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors")) + sorted(p.name for p in folder.glob("*.gguf"))
    found = f"; it holds {listing(others, 3)}" if others else ""
    return LorakitError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there{found}")
