"""Reading tensors without trusting the file, and writing so that a crash leaves the old file or the new one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, LorakitError, WriteError

MAX_TENSORS = 1_000_000
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed writing", "file write failed", "iostream error", "unexpected pos")
_FULL = 1 << 20  # a disk with less than this free
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


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; AdapterError with line and column otherwise."""
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object; AdapterError with line and column otherwise."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{where}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise AdapterError(f"{where}: its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{where} holds a {type(value).__name__}; expected a JSON object")
    return value


@contextmanager
def replacing(path: Path):
    """A temporary path in the same folder; renamed to `path` (after fsync) if the block succeeds, removed otherwise.

    WriteError where that cannot be written: no folder, no permission, no space, or a device that is there.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WriteError(f"{path} is a device or the like, which is not to be replaced by a file\n  give another name")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:
        found = refused_write(path, error)
        if found is None:
            raise
        raise found from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def refused_write(path: Path, error: Exception) -> LorakitError | None:
    """What to say where an operating system would not let `path` be written; None for an error of another kind."""
    if isinstance(error, LorakitError):
        return None
    folder = path.parent
    number = _errno(error, folder)
    if number is None:
        return None
    blocking = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocking is not None:
        why, todo = f"{blocking} is a file, not a folder", "give another place"
    elif path.is_dir():
        why, todo = "there is a folder of that name", "give another name"
    elif number in (errno.EACCES, errno.EPERM):
        why, todo = f"no permission to write in {folder}", "give a folder of yours"
    elif number == errno.EROFS:
        why, todo = f"{folder} is on a disk that can only be read", "give another place"
    elif number in (errno.ENOSPC, errno.EDQUOT):
        why, todo = f"no space is left on the disk of {folder}", "make room, or give a place on another disk"
    elif number == errno.EFBIG:
        why, todo = "the file would be larger than its system or your limits allow (ulimit -f)", "give a place on another disk"
    elif number == errno.ENAMETOOLONG:
        why, todo = "the name is too long for this file system", "give a shorter one"
    else:
        why, todo = os.strerror(number).lower(), "give another place"
    return WriteError(f"cannot write {path}: {why}\n  {todo}; what was there is as it was")


def _errno(error: Exception, folder: Path) -> int | None:
    """The operating system's number of what went wrong, through the words of the libraries that write for us."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    found = re.search(r"\(os error (\d+)\)", text)  # safetensors
    if found:
        return int(found[1])
    if not any(words in text for words in _TORCH_CANNOT_WRITE):
        return None
    return errno.ENOSPC if shutil.disk_usage(folder).free < _FULL else errno.EIO  # torch does not say why


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
