"""PEFT's weights: one file, or in shards with an index, as large adapters are uploaded.

adapter_model.safetensors (or .bin)
adapter_model-00001-of-00003.safetensors ...   adapter_model.safetensors.index.json: {"weight_map": {key: file}}
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..errors import AdapterError, listing
from ..io.json_object import read_json
from .inside import renamed
from .wrappers import read_unwrapped

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json")


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """(tensors, the header, the file to name in errors). AdapterError if there are no weights, or not all shards."""
    for name in (WEIGHTS, PICKLE):
        if (folder / name).exists():
            tensors, header = read_unwrapped(folder / name)
            return tensors, header, folder / name
    shards = _shards(folder)
    if not shards:
        lies = renamed(folder, "adapter_model", (".safetensors", ".bin"))
        raise AdapterError(f"{folder} holds no weights: neither {WEIGHTS} nor {PICKLE} is there{lies}")
    found: dict[str, Tensor] = {}
    headers: dict[str, str] = {}
    for shard in shards:
        tensors, more = read_unwrapped(shard)
        twice = next((key for key in tensors if key in found), None)
        if twice is not None:
            raise AdapterError(f"{shard}: key '{twice}' is in another shard too")
        found, headers = found | tensors, headers | more
    return found, headers, shards[0]


def _shards(folder: Path) -> list[Path]:
    """The shards' files, all there; none if the folder has none."""
    index = next(
        (folder / f"{name}.index.json" for name in (WEIGHTS, PICKLE) if (folder / f"{name}.index.json").is_file()), None
    )
    there = sorted(p.name for p in folder.iterdir() if (match := SHARD.fullmatch(p.name)) and match[1])
    if index is not None:
        named = read_json(index).get("weight_map")
        files = sorted(set(named.values())) if isinstance(named, dict) and all(map(_is_name, named.values())) else []
        if not files:
            raise AdapterError(f"{index}: weight_map is {named!r:.80}; expected an object of keys and file names")
    else:
        counts = {match[2] for name in there if (match := SHARD.fullmatch(name))}
        files = [f"adapter_model-{i + 1:05d}-of-{c}.{there[0].rsplit('.')[-1]}" for c in counts for i in range(int(c))]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            f"{folder}: {len(missing)} of {len(files)} shards are not there: {listing(missing, 3)}\n"
            f"  it holds {listing(there, 3) or 'none'}; put the others beside them"
        )
    return [folder / name for name in files]


def _is_name(name: object) -> bool:
    """Whether it is the name of a file in the folder itself."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
