"""A lock on an output, so that no two processes write it at once.

The operating system holds it (flock), so it ends with its process, also after SIGKILL. The file itself may stay behind
then; it means nothing without the lock on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def locked(file: Path, what: str, fix: str) -> Iterator[None]:
    """Hold a lock on `file`, which is created and, in the end, deleted.

    Raises WriteError, naming the other process, if one holds it, and OSError if the file cannot be written. `what`,
    `fix`: for that message, what is written and what else to do than to wait. Where the file system has no locks, the
    process id in the file decides.
    """
    handle = _take(file, what, fix)
    try:
        yield
    finally:
        # Deleted before it is released: whoever opened it meanwhile notices that it is gone and makes a new one.
        file.unlink(missing_ok=True)
        os.close(handle)


def _take(file: Path, what: str, fix: str) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            owner = os.pread(handle, 200, 0).decode("utf8", "replace").split()
            if not _lock(handle, owner):
                by = f"process {owner[0]}" if owner else "another process"
                at = f" on {owner[1]}" if len(owner) > 1 and owner[1] != socket.gethostname() else ""
                raise WriteError(f"{what} is being written by {by}{at}\n  wait until it has ended, or {fix}")
            if is_file_of(file, handle):
                with contextlib.suppress(OSError):  # on a full disk: the name is for messages
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, owner: list[str]) -> bool:
    """Lock an open file. Returns False if another process has it."""
    try:
        return flock(handle)
    except OSError:
        here = len(owner) == 2 and owner[1] == socket.gethostname()
        return not (here and owner[0].isdigit() and _alive(int(owner[0])))


def flock(handle: int, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed. Returns False if it is taken and `wait` is False.

    Raises OSError where there are no locks: on Windows, and on some file systems.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no file locks")
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and another user's
        return True
    return process != os.getpid()


def is_file_of(file: Path, handle: int) -> bool:
    """Whether `file` is still the open one: its last owner may have deleted it between the opening and the locking."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False
