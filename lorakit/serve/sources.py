"""Read an adapter's files for the server: a private copy is hashed, checked and then parsed.

    key = sha256 of (name, size, sha256 of the content) of its weights, config and lorakit.json

Why a copy: safetensors files are mapped into memory, and one that is cut short while it is read (PEFT saves into the
same file) ends the process with SIGBUS. The copy cannot change under the reader, what is parsed is what was hashed, and
each file is opened once, by a path that was checked. It costs about 1 ms per MB, and is deleted at once.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, LorakitError, WriteError
from .guard.adapter_files import FileRules, check_files, check_large
from .guard.roots import open_below

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter

log = logging.getLogger(__name__)
MOST_FILES = 10_000  # in an adapter's folder
LONGEST_ERROR = 2_000  # characters; it may quote a file
PREFIX = "lorakit-read-"  # of the temporary folders with copies
ABANDONED = 3600.0  # seconds after which a copy is nobody's: reading takes less
_CHUNK = 1 << 20
_INSIDE = ("virtual_tokens", "adapter", "adapter/virtual_tokens")  # folders in which parts of an adapter may be
_RUN = "config.yaml"  # a training run's: its result is in adapter/

Stamp = tuple[tuple[str, int, int, int, int], ...]  # (name, inode, size, modified, changed) of each file


@dataclass(frozen=True)
class AdapterFiles:
    """The files that an adapter consists of.

    names: relative to the folder. opened: which of them to read it by, "" for the folder itself. boundary: a resolved
    folder that all files must lie in, after symbolic links; None: anywhere.
    """

    label: str  # the adapter's name, for messages
    folder: Path
    names: tuple[str, ...]
    opened: str
    boundary: Path | None
    rules: FileRules

    def stamp(self) -> Stamp:
        """Return what changes when a file is written: compared to see whether reading again can end otherwise."""
        found = []
        for name in self.names:
            try:
                about = os.stat(self.folder / name)
            except OSError:
                found.append((name, 0, 0, 0, 0))
                continue
            found.append((name, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))
        return tuple(found)

    @property
    def modified(self) -> int:
        """Return when the newest of the files was written, in seconds since 1970."""
        return max((modified for *_, modified, _ in self.stamp()), default=0) // 1_000_000_000


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter with the hash of the files that it was read from, and their bytes."""

    adapter: Adapter
    key: str
    size: int


def files_at(path: Path, label: str, boundary: Path | None, rules: FileRules) -> AdapterFiles:
    """Choose an adapter's files in a folder, or beside a file.

    A run's folder stands for its result. Raises AdapterError if there is no adapter, or there are several.
    """
    from ..formats.hub import HubName, choose

    inside = None
    if not path.is_dir():
        path, inside = path.parent, path.name
    there = _files_in(path, label, boundary)
    if inside is None and _RUN in there and any(name.startswith("adapter/") for name in there):
        path = path / "adapter"
        there = {name.removeprefix("adapter/"): size for name, size in there.items() if name.startswith("adapter/")}
    names, opened = choose(there, HubName(label, None, inside))
    return AdapterFiles(label, path, tuple(names), opened.rstrip("/"), boundary, rules)


def _files_in(folder: Path, label: str, boundary: Path | None) -> dict[str, int | None]:
    """Return a folder's files with their sizes, and those of the folders in it that can hold parts of an adapter.

    A folder that a link leads out of the boundary is left out: errors list the names of what is there.
    """
    found: dict[str, int | None] = {}
    for inner in ("", *_INSIDE):
        where = (folder / inner).resolve()
        if not where.is_dir() or (boundary is not None and not where.is_relative_to(boundary)):
            continue
        try:
            with os.scandir(where) as entries:
                for count, entry in enumerate(entries):
                    if count > MOST_FILES:
                        raise AdapterError(
                            f"'{label}' is a folder of more than {MOST_FILES:,} files; expected an adapter"
                        )
                    if entry.name.isprintable() and not entry.is_dir():  # names end up in errors, as UTF-8
                        found[f"{inner}/{entry.name}" if inner else entry.name] = _size(entry)
        except OSError as error:
            raise AdapterError(f"'{label}' cannot be read: {(error.strerror or '').lower()}") from error
    return found


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing
        return None


def read_adapter(files: AdapterFiles, base: Any = None) -> ReadAdapter:
    """Read an adapter and hash its files. Not for the event loop's thread.

    base: the base's folder or transformers config, which the GGUF of a Llama needs. Raises AdapterError, whose message
    has no path but those relative to the adapter, and WriteError where the copy has no space.
    """
    with _temporary_folder(files.label) as temporary:
        copy = Path(temporary) / re.sub(r"[^\w-]", "_", files.label)  # readers' log lines have it
        try:
            key, size = _copied(files, copy)
            check_files(copy, files.names, files.rules)
            return ReadAdapter(_loaded(copy / files.opened, base), key, size)
        except WriteError:
            raise
        except LorakitError as error:
            raise AdapterError(_without(str(error), copy, files)) from error
        except Exception as error:  # a config can be wrong in ways that no reader foresees; the server goes on
            log.exception("reading the adapter '%s' failed", files.label)
            raise AdapterError(
                f"adapter '{files.label}' cannot be read: {type(error).__name__}: "
                f"{_without(str(error), copy, files)[:300]}"
            ) from error


def remove_abandoned() -> None:
    """Delete copies that a server left behind which was killed while it read."""
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # the disk is full; reading says so
        return
    for folder in temporary.glob(f"{PREFIX}*"):
        try:
            about = folder.lstat()
            ours = not hasattr(os, "getuid") or about.st_uid == os.getuid()
            if stat.S_ISDIR(about.st_mode) and ours and about.st_mtime < time.time() - ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # deleted meanwhile
            continue


def _temporary_folder(label: str) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    except OSError as error:  # on a full disk Python finds no folder for temporary files at all, an ENOENT
        full = isinstance(error, FileNotFoundError)
        raise _refused(OSError(errno.ENOSPC, "") if full else error, label) from error


def _copied(files: AdapterFiles, copy: Path) -> tuple[str, int]:
    """Copy the files and return the key and their bytes."""
    digest, total = hashlib.sha256(), 0
    alone = files.opened != "" and len(files.names) == 1  # a file's own name says nothing about what it holds
    for name in sorted(files.names):
        content, size = hashlib.sha256(), 0
        with os.fdopen(open_below(files.folder / name, files.boundary), "rb", buffering=0) as source:
            before = os.fstat(source.fileno())
            if total + before.st_size > files.rules.total:
                raise AdapterError(
                    f"adapter '{files.label}' has more than the {files.rules.total:,} bytes that one may have"
                )
            # Before the copy, which takes as much space as the file. What is used is checked again, in the copy.
            check_large(Path(name), source, files.rules)
            source.seek(0)
            try:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                with open(copy / name, "wb", buffering=0) as target:
                    while size <= before.st_size and (chunk := source.read(_CHUNK)):
                        size += len(chunk)
                        content.update(chunk)
                        _write(target, chunk)
            except OSError as error:
                raise _refused(error, files.label) from error
            after = os.fstat(source.fileno())
        if size != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
            raise AdapterError(f"{name} of adapter '{files.label}' was written while it was read\n  try again")
        total += size
        hashed_name = Path(name).suffix if alone else name
        digest.update(f"{len(hashed_name)} {hashed_name} {size} ".encode() + content.digest())
    return digest.hexdigest(), total


def _write(target: Any, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[target.write(left) :]


def _refused(error: OSError, label: str) -> LorakitError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return WriteError(
            f"adapter '{label}' cannot be read: no space is left for the copy that is made before\n"
            "  free some space for temporary files, or set TMPDIR to a folder on another disk"
        )
    return AdapterError(f"adapter '{label}' cannot be read: {(error.strerror or type(error).__name__).lower()}")


def _loaded(path: Path, base: Any) -> Adapter:
    """Load an adapter into memory of its own: the tensors as read are pages of a file that is about to be deleted, and
    would keep its place on the disk.
    """
    from ..adapter.adapter import Adapter

    read = Adapter.load(path, base=base)
    return replace(
        read,
        updates={module: update.map(lambda _, tensor: tensor.clone()) for module, update in read.updates.items()},
        saved={name: tensor.clone() for name, tensor in read.saved.items()},
        embeddings={token: tensor.clone() for token, tensor in read.embeddings.items()},
    )


def _without(message: str, copy: Path, files: AdapterFiles) -> str:
    """Name files by the adapter's name instead of where the copy, or the original, is."""
    for path in (copy, files.folder):
        message = message.replace(f"{path}/", "").replace(str(path), files.label)
    message = message.encode("utf8", "backslashreplace").decode()[
        :LONGEST_ERROR
    ]  # JSON can hold halves of surrogate pairs
    named = f"'{files.label}'" in message or message.startswith(files.label)
    return message if named else f"adapter '{files.label}': {message}"


@dataclass
class FileSource:
    """An `engine.Source`: reads an adapter's files again, and refuses others than those of its key.

    files: where it lies; several, if several names have the same content. first: the values as read for the key, given
    out once instead of reading them again.
    """

    key: str
    files: list[AdapterFiles]
    base: Any = None
    first: Adapter | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return self.files[0].label

    def read(self) -> Adapter:
        first, self.first = self.first, None
        if first is not None:
            return first
        problem: LorakitError = AdapterError(f"adapter '{self.label}' was unloaded")
        for files in list(self.files):
            try:
                read = read_adapter(files, self.base)
            except LorakitError as error:
                problem = error
                continue
            if read.key == self.key:
                return read.adapter
            problem = AdapterError(
                f"the files of adapter '{files.label}' changed since it was loaded, and it was not kept in memory\n"
                '  load it again: POST /v1/load_lora_adapter with "load_inplace": true'
            )
        raise problem
