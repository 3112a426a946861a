"""Adapters as vLLM reads them, on disk: a folder for each, named by a hash of what it holds, bounded in bytes.

    CACHE/9f86d081…/            adapter_config.json, adapter_model.safetensors, exported.json
          9f86d081….lock        locked while the folder is written (exclusive) or in use (shared)

vLLM reads a folder again after it evicted the adapter, so that a folder stays while its adapter is loaded; the lock
says so to other lorakit servers with the same cache too. `exported.json` is written last: a folder without it, or whose
files have other sizes than it says, is written again. Least recently used folders go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import WriteError
from ...io.atomic import write_errors, write_text

try:
    import fcntl
except ImportError:  # Windows, where vLLM does not run
    fcntl = None  # type: ignore[assignment]

RECORD, FORMAT = "exported.json", 1
BYTES = 20 << 30


def default_folder() -> Path:
    """Return the cache's folder, below the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorakit" / "vllm"


class ExportCache:
    """The cache. Its methods block; call them off the event loop."""

    def __init__(self, folder: Path | None = None, most: int = BYTES):
        """most: bytes of all folders. Those in use stay, also beyond that."""
        self.folder = default_folder() if folder is None else folder.expanduser().resolve()
        self.most = most
        self._held: dict[str, int] = {}  # key -> the open lock file
        self._busy = threading.Lock()

    def hold(self, key: str, write: Callable[[Path], object]) -> Path:
        """Return the folder of `key`, and keep it until `release`. `write(path)`: makes it, if it is not there.

        Raises what `write` raises, and WriteError where the cache cannot be written.
        """
        with self._busy:
            path = self.folder / _name(key)
            if key not in self._held:
                self._held[key] = self._kept(path, write)
                self._evict()
            return path

    def release(self, key: str) -> int:
        """Let a folder be evicted when space is needed. Return its bytes; 0 if it was not held."""
        with self._busy:
            handle = self._held.pop(key, None)
            if handle is None:
                return 0
            os.close(handle)
            return _bytes(self.folder / _name(key))

    def _kept(self, path: Path, write: Callable[[Path], object]) -> int:
        """Make a folder if need be, and return its lock file, locked so that nobody deletes the folder."""
        file = path.with_name(f"{path.name}.lock")
        with write_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            complete = _is_complete(path)
            with write_errors(path):
                handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _flock(handle, shared=complete)  # exclusive: waits for another process that writes the folder
                if not complete and _is_at(file, handle):
                    if not _is_complete(path):
                        self._write(path, write)
                    _flock(handle, shared=True)
                # Between two locks another process may have deleted it.
                if _is_complete(path) and _is_at(file, handle):
                    os.utime(path / RECORD)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        with write_errors(path):
            if path.exists():
                shutil.rmtree(path)
        write(path)
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        write_text(path / RECORD, json.dumps({"format": FORMAT, "files": sizes}))

    def _evict(self) -> None:
        """Delete folders that nobody uses, oldest first, until the rest fits."""
        found = [(path.stat().st_mtime, path.parent) for path in self.folder.glob(f"*/{RECORD}")]
        sizes = {folder: _bytes(folder) for _, folder in found}
        total = sum(sizes.values())
        for _, folder in sorted(found):
            if total <= self.most:
                return
            with self._unused(folder.name) as unused:
                if unused:
                    shutil.rmtree(folder, ignore_errors=True)
                    total -= sizes[folder]

    @contextlib.contextmanager
    def _unused(self, name: str) -> Iterator[bool]:
        """Lock a folder for deletion. Yields False if it is in use, here or in another process."""
        file = self.folder / f"{name}.lock"
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            unused = _flock(handle, shared=False, wait=False)
            yield unused
            if unused:
                file.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _name(key: str) -> str:
    """Return a folder's name for a key, whatever characters the key has."""
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _flock(handle: int, shared: bool, wait: bool = True) -> bool:
    """Lock an open file; return False if it is taken and `wait` is False."""
    if fcntl is None:
        raise WriteError("the cache for vLLM needs file locks, which Windows has not\n  use the embedded engine")
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_at(file: Path, handle: int) -> bool:
    """Whether `file` is still the open one: another process may have deleted it meanwhile."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _is_complete(path: Path) -> bool:
    """Whether a folder was written to its end, and its files have the sizes that they had then."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf8"))
        files = record["files"]
        return record["format"] == FORMAT and all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
