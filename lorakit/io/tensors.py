"""Tensors in files: read without trusting the file, written atomically and the same bytes each time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError
from .atomic import replacing

MAX_TENSORS = 1_000_000
MAX_ELEMENTS = 1 << 36  # 64 Gi numbers: no adapter is near it


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header metadata) of a `.safetensors`, or of a pickled state dict through `weights_only=True`.

    Raises AdapterError naming the file, and the key where one is at fault. Header claims are checked against the file's
    size before memory is taken.
    """
    return _read_safetensors(path) if _is_safetensors(path) else (_read_pickle(path), {})


def keys_of(path: Path) -> list[str]:
    """The names of a file's tensors; of a safetensors file without reading them."""
    if not _is_safetensors(path):
        return list(_read_pickle(path))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """By its first bytes, a length and a JSON object; a pickle starts otherwise. What is neither is what its name says."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if head[8:] == b"{":
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise AdapterError(f"{path}: {len(names):,} tensors; no adapter has that many")
            for name in names:
                _check_claim(path, name, file.get_slice(name).get_shape())
            for name in names:
                tensors[name] = file.get_tensor(name)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    value = read_pickled(path)
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a list; expected a state dict of named tensors")
    return value


def read_pickled(path: Path) -> dict[str, Tensor] | list[Tensor]:
    """A pickled state dict, or a pickled list of tensors, through `weights_only=True`. AdapterError for anything else."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:  # torch never compresses
                    raise ValueError("it is compressed, and would unpack to more than its size")
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterError(
            f"{path} is not a state dict that can be read safely: {next(iter(str(error).split('. ')[0].splitlines()), type(error).__name__)}\n"
            "  lorakit never runs code from an adapter; have its author save it as safetensors"
        ) from error
    named = value if isinstance(value, Mapping) else {f"[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else None
    if named is None or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in named.items()):
        raise AdapterError(f"{path} holds a {type(value).__name__}; expected a state dict of named tensors")
    for name, tensor in named.items():
        _check_claim(path, name, list(tensor.shape))
        # A view that repeats a few stored numbers would fill the memory when it is copied.
        whole = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not whole or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise AdapterError(f"{path}: '{name}' is not a plain tensor whose numbers are all in the file")
    return list(value) if isinstance(value, list) else dict(named)


def _check_claim(path: Path, name: str, shape: list[int]) -> None:
    count = 1
    for size in shape:
        count *= size
    if count > MAX_ELEMENTS:
        raise AdapterError(f"{path}: '{name}' claims shape {shape}, {count:,} numbers; no adapter is that large")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, keys in sorted order."""
    from safetensors.torch import save_file

    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with replacing(path) as temporary:
        save_file(ready, temporary, metadata=dict(metadata or {}) or None)
        if metadata and len(metadata) > 1:
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the metadata's keys in an order that changes; sorted, equal adapters are equal files."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf8")
        if len(text) <= size:  # it is the same text in another order
            file.seek(8)
            file.write(text.ljust(size))
