"""Adapters as vLLM reads them, on disk: a folder for each, named by a hash of what it holds, bounded in bytes.

    CACHE/9f86d081…/exported.json
          9f86d081…/adapter/    adapter_config.json, adapter_model.safetensors
          9f86d081….lock        locked while the folder is written (exclusive) or in use (shared)

vLLM reads a folder again after it evicted the adapter, so that a folder stays while its adapter is loaded; the lock
says so to other lorakit servers with the same cache too. `exported.json` is written last: a folder without it, or whose
files have other sizes than it says, was not finished. It is written again when it is asked for, and is the first to go
when space is needed; then those used least recently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ...io.atomic import write_errors, write_text
from ...io.lock import flock, is_file_of

RECORD, FORMAT = "exported.json", 2
ADAPTER = "adapter"  # what `write` makes, in a folder of its own: what it puts beside it is ours to delete
MAX_BYTES = 20 << 30
_OURS = re.compile("[0-9a-f]{40}")  # names of folders; nothing else is deleted
PAUSE = 0.05  # seconds between two looks at a folder that somebody else writes


def default_folder() -> Path:
    """Return the cache's folder, below the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorakit" / "vllm"


class ExportCache:
    """The cache. Thread-safe. `hold` reads and writes files: call it off the event loop. `release` does not wait."""

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES):
        """max_bytes: of all folders. Those in use stay, also beyond that."""
        self.folder = default_folder() if folder is None else folder.expanduser().resolve()
        self.max_bytes = max_bytes
        self._held: dict[str, int] = {}  # key -> the open lock file
        self._busy = threading.Lock()  # around `_held` alone: `release` is called in the event loop

    def hold(self, key: str, write: Callable[[Path], object]) -> Path:
        """Return the adapter's folder of `key`, and keep it until `release`. `write(path)`: makes it if need be.

        Raises what `write` raises, and WriteError where the cache cannot be written.
        """
        folder = self.folder / _name(key)
        with self._busy:
            if key in self._held:
                return folder / ADAPTER
        handle = self._kept(folder, write)
        with self._busy:
            if key in self._held:  # by another thread meanwhile
                os.close(handle)
            else:
                self._held[key] = handle
        try:
            self._evict()
        except BaseException:
            self.release(key)
            raise
        return folder / ADAPTER

    def release(self, key: str) -> None:
        """Let a folder be evicted when space is needed."""
        with self._busy:
            handle = self._held.pop(key, None)
        if handle is not None:
            os.close(handle)

    def _kept(self, folder: Path, write: Callable[[Path], object]) -> int:
        """Make a folder if need be, and return its lock file, locked so that nobody deletes the folder."""
        file = folder.with_name(f"{folder.name}.lock")
        with write_errors(folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            complete = _is_complete(folder)
            with write_errors(folder):
                handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Asked for again and again: whoever writes the folder now keeps the lock, shared, once it is written,
                # and waiting for the exclusive one would last as long as the adapter is loaded there.
                if flock(handle, shared=complete) and is_file_of(file, handle):
                    if not complete and not _is_complete(folder):
                        self._write(folder, write)
                    flock(handle, shared=True, wait=True)
                    # Between two locks another process may have deleted it.
                    if _is_complete(folder) and is_file_of(file, handle):
                        os.utime(folder / RECORD)
                        return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            time.sleep(PAUSE)

    def _write(self, folder: Path, write: Callable[[Path], object]) -> None:
        """Make a folder; if that fails, nothing of it stays."""
        try:
            with write_errors(folder):
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir()
                write(folder / ADAPTER)
                sizes = {file.name: file.stat().st_size for file in (folder / ADAPTER).iterdir()}
                write_text(folder / RECORD, json.dumps({"format": FORMAT, "files": sizes}))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _evict(self) -> None:
        """Delete folders that nobody uses, unfinished ones first, then the oldest, until the rest fits."""
        folders = [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.is_dir()]
        found = sorted((_used(folder), folder.name, _bytes(folder)) for folder in folders)
        total = sum(size for _, _, size in found)
        for used, name, size in found:
            if total <= self.max_bytes and used:
                return
            with self._unused(name) as unused:
                if unused:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                    total -= size

    @contextlib.contextmanager
    def _unused(self, name: str) -> Iterator[bool]:
        """Lock a folder for deletion. Yields False if it is in use, here or in another process."""
        file = self.folder / f"{name}.lock"
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # A file that was deleted meanwhile locks nothing: somebody may use the folder under a new one.
            unused = flock(handle) and is_file_of(file, handle)
            yield unused
            if unused:
                file.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _name(key: str) -> str:
    """Return a folder's name for a key, whatever characters the key has."""
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _is_complete(folder: Path) -> bool:
    """Whether a folder was written to its end, and its files have the sizes that they had then."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf8"))
        sizes = record["files"].items()
        return record["format"] == FORMAT and all((folder / ADAPTER / name).stat().st_size == n for name, n in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _used(folder: Path) -> float:
    """Return when a folder was last asked for; 0 if it was not finished, or has gone."""
    try:
        return (folder / RECORD).stat().st_mtime
    except OSError:
        return 0.0


def _bytes(folder: Path) -> int:
    """Return the bytes of a folder's files. Another process may be writing or deleting it."""
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(inside, name)).st_size
    return total
