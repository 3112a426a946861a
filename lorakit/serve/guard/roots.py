"""The folders below which adapters may be loaded over HTTP, and how a file below one is opened.

A client names a place relative to a root. What it leads to after all symbolic links must lie below that root, checked
before a file is opened and again on the open file, so that a link that is exchanged in between leads nowhere. Pipes and
devices are never opened for reading: a read of one may not return, or may act on the machine.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ...errors import AdapterError, ConfigError

MOST_CHARACTERS = 1_024  # of a place
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class Roots:
    """The allowed folders, in the order in which a place is looked for. Empty: nothing may be loaded over HTTP."""

    def __init__(self, folders: Sequence[str | Path] = ()):
        """Raises ConfigError for what is not a folder."""
        found = []
        for folder in folders:
            try:
                path = Path(folder).expanduser().resolve(strict=True)
            except (OSError, RuntimeError) as error:
                raise ConfigError(f"{folder} cannot be a root of adapters: there is no such folder") from error
            if not path.is_dir():
                raise ConfigError(f"{folder} cannot be a root of adapters: it is not a folder\n  give the one it is in")
            found.append(path)
        self.folders: tuple[Path, ...] = tuple(dict.fromkeys(found))

    def __bool__(self) -> bool:
        return bool(self.folders)

    def locate(self, place: str) -> tuple[Path, Path] | None:
        """Return (root, resolved path) of a place relative to a root; None if no root has it.

        Raises AdapterError, without any absolute path, for a place that is absolute, has "..", or leads out of its
        root, and ConfigError if there are no roots.
        """
        relative = check_place(place)
        if not self.folders:
            raise ConfigError("no folder is allowed to load adapters from\n  start the server with --adapters FOLDER")
        for root in self.folders:
            try:
                path = (root / relative).resolve(strict=True)
            except (OSError, RuntimeError):  # nothing there, a loop of links, or no permission
                continue
            if not path.is_relative_to(root):
                raise AdapterError(f"'{place}' leads out of the folder that adapters are loaded from")
            if path == root:
                raise AdapterError(f"'{place}' is the folder that adapters are loaded from\n  name one in it")
            return root, path
        return None


def check_place(place: str) -> PurePosixPath:
    """Return a client's place as a relative path. Raises AdapterError for what cannot be one."""
    if not place or len(place) > MOST_CHARACTERS:
        raise AdapterError(f"a path of {len(place)} characters; expected 1 to {MOST_CHARACTERS}")
    if not place.isprintable() or "\\" in place or ":" in place:
        raise AdapterError(f"the path {place[:100]!r} has characters that no place may have")
    if place.startswith(("/", "~")):
        raise AdapterError(
            "an absolute path was given\n  expected one relative to a folder that the server was started with "
            "(--adapters)"
        )
    path = PurePosixPath(place)
    if ".." in path.parts:
        raise AdapterError(f"the path '{place}' has '..' in it\n  expected one that only goes down")
    return path


def open_below(path: Path, boundary: Path | None) -> int:
    """Open a regular file for reading and return its descriptor.

    boundary: the resolved folder that the file must lie in after symbolic links; None: it may lie anywhere. Raises
    AdapterError that names the file by its last part only.
    """
    try:
        real = path.resolve(strict=True)
        if boundary is not None and not real.is_relative_to(boundary):
            raise AdapterError(f"{path.name} is a link that leads out of the folder that adapters are loaded from")
        descriptor = os.open(real, _FLAGS)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "a loop of links"
        raise AdapterError(f"{path.name} cannot be opened: {why.lower()}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterError(f"{path.name} is not a regular file (a folder, pipe or device)")
        if boundary is not None and not _lies_in(descriptor, real, boundary):
            raise AdapterError(f"{path.name} was exchanged while it was opened\n  try again")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lies_in(descriptor: int, real: Path, boundary: Path) -> bool:
    """Whether an open file lies below the boundary: a folder on its way may have become a link since `resolve`."""
    if sys.platform.startswith("linux"):
        try:
            return Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(boundary)
        except OSError:  # no /proc here
            pass
    again = real.resolve()
    return again.is_relative_to(boundary) and os.path.samestat(os.stat(again), os.fstat(descriptor))
