"""Atomic writes: after a crash there is either the old file or the new one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LorakitError, WriteError

_TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed writing", "file write failed", "iostream error", "unexpected pos")
_FULL = 1 << 20  # bytes: a disk with less free space than this counts as full


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; rename it to `path` after fsync if the block succeeds, else remove it.

    Raises WriteError where it cannot be written: no folder, no permission, no space, or `path` is a device.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WriteError(f"{path} is not a regular file (a device or a pipe) and is not replaced\n  give another name")
    temporary = None
    try:
        with write_errors(path):
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
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` inside the block into a WriteError."""
    try:
        yield
    except Exception as error:
        write_error = refused_write(path, error)
        if write_error is None:
            raise
        raise write_error from error


def refused_write(path: Path, error: Exception) -> LorakitError | None:
    """Return the WriteError for a system's refusal to write `path`; None if `error` is about something else."""
    if isinstance(error, LorakitError):
        return None
    folder = path.parent
    code = _errno(error, folder)
    if code is None:
        return None
    blocking = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocking is not None:
        why, fix = f"{blocking} is a file, not a folder", "give another path"
    elif path.is_dir() and code in (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
        why, fix = "a folder has that name", "give another name"
    elif code in (errno.EACCES, errno.EPERM):
        why, fix = f"no permission to write in {folder}", "give a folder that you may write to"
    elif code == errno.EROFS:
        why, fix = f"{folder} is on a read-only file system", "give another path"
    elif code in (errno.ENOSPC, errno.EDQUOT):
        why, fix = f"no space left on the disk of {folder}", "free some space, or give a path on another disk"
    elif code == errno.EFBIG:
        why = "the file would exceed the largest size that the file system or your limits allow (ulimit -f)"
        fix = "raise the limit, or give a path on another disk"
    elif code == errno.ENAMETOOLONG:
        why, fix = "the name is too long for this file system", "give a shorter one"
    else:
        why, fix = os.strerror(code).lower(), "give another path"
    return WriteError(f"cannot write {path}: {why}\n  {fix}; existing files are unchanged")


def _errno(error: Exception, folder: Path) -> int | None:
    """Return the errno behind an error, also where safetensors or torch hide it in a message; None if there is none."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    match = re.search(r"\(os error (\d+)\)", text)  # safetensors
    if match:
        return int(match[1])
    if not any(message in text for message in _TORCH_CANNOT_WRITE):
        return None
    return errno.ENOSPC if shutil.disk_usage(folder).free < _FULL else errno.EIO  # torch does not say why


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that renames in it survive a crash."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
