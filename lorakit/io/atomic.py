"""Writing so that a crash leaves the old file or the new one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from ..errors import LorakitError, WriteError

_TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed writing", "file write failed", "iostream error", "unexpected pos")
_FULL = 1 << 20  # a disk with less than this free, in bytes


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


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
