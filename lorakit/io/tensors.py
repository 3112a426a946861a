"""Read tensors from untrusted files, and write them atomically, with equal bytes for equal tensors."""

from __future__ import annotations

import json
import logging
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError, listing, not_the_file
from .atomic import replacing

log = logging.getLogger(__name__)
MAX_TENSORS = 1_000_000
MAX_UNPACKED = 8  # times a compressed archive's size; weights hardly shrink
MAX_ELEMENTS = 1 << 36  # per tensor, far above any adapter


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, header metadata) of a safetensors file, or of a pickle read with `weights_only=True`.

    Raises AdapterError, naming the file and, where one is at fault, the key. Sizes in the header are checked against
    the file's before memory is allocated.
    """
    if _is_safetensors(path):
        return _read_safetensors(path)
    return _read_npz(path) if _is_npz(path) else _read_pickle(path), {}


def keys_of(path: Path) -> list[str]:
    """Return the names of a file's tensors; a safetensors file's data is not read. Raises AdapterError."""
    if not _is_safetensors(path):
        return list(_read_npz(path) if _is_npz(path) else _read_pickle(path))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors, by name. Raises AdapterError; the data is not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error


def refuse_placeholder(path: Path) -> None:
    """Raise AdapterError if a git-lfs pointer or a web page is there instead of the file."""
    problem = not_the_file(path)
    if problem is not None:
        raise AdapterError(problem)


def _is_safetensors(path: Path) -> bool:
    """Decide by the first 9 bytes: a length within the file and "{", or the start of a pickle; else by the suffix.

    Raises AdapterError for what only stands in a file's place.
    """
    refuse_placeholder(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
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
    """Read a pickled state dict or list of tensors with `weights_only=True`. Raises AdapterError for anything else."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:  # torch never compresses
                    raise ValueError("it is compressed, and would unpack to more than its size")
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).split(". ")[0].splitlines()), type(error).__name__)
        raise AdapterError(
            f"{path} is not a state dict that can be read safely: {reason}\n"
            "  lorakit never runs code from an adapter; have its author save it as safetensors"
        ) from error
    value = _unpacked(value)
    named = {f"[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else value
    if not isinstance(named, Mapping):
        named = None
    if named is None or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in named.items()):
        raise AdapterError(f"{path} holds a {type(value).__name__}; expected a state dict of named tensors")
    for name, tensor in named.items():
        _check_claim(path, name, list(tensor.shape))
        # An expanded view of a few stored elements would fill the memory when copied.
        plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise AdapterError(f"{path}: '{name}' is not a plain tensor whose elements are all in the file")
    return list(value) if isinstance(value, list) else dict(named)


# Where trainers keep the state dict in a checkpoint of more things: Lightning, litgpt, DeepSpeed, own loops.
_CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "lora_state_dict",
    "adapter_state_dict",
    "model",
    "module",
    "lora",
    "adapter",
    "network",
    "params",
)


def _unpacked(value: object) -> object:
    """The state dict that a checkpoint holds beside a trainer's own state; anything else is itself."""
    if not isinstance(value, Mapping) or any(isinstance(v, Tensor) and v.dim() for v in value.values()):
        return value
    for name in _CONTAINERS:
        inner = value.get(name)
        if isinstance(inner, Mapping) and inner:
            beside = [str(key) for key in value if key != name]
            if beside:
                log.info("read the checkpoint's '%s'; left aside: %s", name, listing(beside))
            return _unpacked(inner)
    return value


def _is_npz(path: Path) -> bool:
    """Whether a file is numpy's archive of arrays (`numpy.savez`, MLX's older adapters)."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, EOFError, struct.error):
        return False  # no archive, or a damaged one, of which the reader of pickles says more
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read numpy's archive without pickles; sizes are checked before memory is taken."""
    import numpy as np

    tensors: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > MAX_UNPACKED * max(path.stat().st_size, 1 << 20):
            raise ValueError(f"it is compressed, and would unpack to {claimed:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # numpy has no bf16: raw bytes
                    tensors[name] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
                elif array.dtype.kind in "fiub":
                    tensors[name] = torch.from_numpy(np.ascontiguousarray(array))
                else:
                    raise ValueError(f"'{name}' has dtype {array.dtype}")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError, KeyError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AdapterError(f"{path} is not a readable archive of numpy arrays: {reason}") from error
    return tensors


def _check_claim(path: Path, name: str, shape: list[int]) -> None:
    count = 1
    for size in shape:
        count *= size
    if count > MAX_ELEMENTS:
        raise AdapterError(f"{path}: '{name}' claims shape {shape}, {count:,} elements; no adapter is that large")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with sorted keys. Raises WriteError."""
    from safetensors.torch import save_file

    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with replacing(path) as temporary:
        save_file(ready, temporary, metadata=dict(metadata or {}) or None)
        if metadata and len(metadata) > 1:
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata's keys, which safetensors writes in varying order, so that equal adapters make equal files."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf8")
        if len(text) <= size:  # the same text in another order, so it fits
            file.seek(8)
            file.write(text.ljust(size))
