"""Adapters of the Hugging Face hub that may be loaded over HTTP: those of owners and repositories named at the start.

    OWNER/NAME, OWNER/NAME@REVISION, hf://OWNER/NAME

The hub's address and token are the server's own (HF_ENDPOINT, HF_TOKEN), never the request's. The repository's files
and their sizes are asked for first, and only an adapter's files are downloaded.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AdapterError, ConfigError, LorakitError
from ..errors import Unreachable

if TYPE_CHECKING:
    from ...formats.hub import HubName

_PART = r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}"
_ALLOWED = re.compile(rf"{_PART}(/{_PART})?")
_PLACE = re.compile(rf"(?:hf://)?(?P<repository>{_PART}/{_PART})(?:@(?P<revision>{_PART}))?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FREE = 1 << 30  # bytes that must stay free on the cache's disk


@dataclass(frozen=True)
class Fetched:
    """Where an adapter's files are after a download. boundary: the repository's folder in the cache, with its blobs."""

    path: Path
    boundary: Path


class Hub:
    """The allowed owners (OWNER) and repositories (OWNER/NAME). Empty: nothing is fetched."""

    def __init__(self, allowed: Sequence[str] = (), most_bytes: int = 4 << 30):
        """most_bytes: the largest adapter that is fetched. Raises ConfigError for what is not OWNER or OWNER/NAME."""
        for name in allowed:
            if _ALLOWED.fullmatch(name) is None or ".." in name:
                raise ConfigError(f"'{name}' is not an owner or a repository of the hub; expected OWNER or OWNER/NAME")
        self.allowed = frozenset(name.lower() for name in allowed)
        self.most_bytes = most_bytes

    def __bool__(self) -> bool:
        return bool(self.allowed)

    def is_place(self, place: str) -> bool:
        """Whether a text has the form of a hub id."""
        return _PLACE.fullmatch(place) is not None and ".." not in place

    def fetch(self, place: str, *, pickles: bool = False) -> Fetched:
        """Download an adapter, or take it from huggingface_hub's cache. Not for the event loop's thread.

        Raises ConfigError for a repository that is not allowed, AdapterError for one that is not there, has no adapter,
        only a pickle, or is too large, and Unreachable if the hub does not answer and the cache does not have it.
        """
        from ...formats.hub import HubName
        from ...io.hub_errors import reason, unreachable

        found = _PLACE.fullmatch(place)
        if found is None or ".." in place:
            raise ConfigError(f"{place[:100]!r} is not a hub id; expected OWNER/NAME or OWNER/NAME@REVISION")
        name = HubName(found["repository"], found["revision"])
        if not self._allows(name.repository):
            raise ConfigError(
                f"'{name.repository}' is not among the hub's repositories that may be loaded here\n"
                f"  start the server with --hub {name.repository.split('/')[0]}, or --hub {name.repository}"
            )
        try:
            return self._fetch(name, pickles)
        except LorakitError:
            raise
        except Exception as error:
            raise _refused(f"the hub did not give '{place}': {reason(error, *name[:2])}", unreachable(error)) from error

    def _allows(self, repository: str) -> bool:
        repository = repository.lower()
        return repository in self.allowed or repository.split("/")[0] in self.allowed

    def _fetch(self, name: HubName, pickles: bool) -> Fetched:
        from huggingface_hub import snapshot_download

        from ...bases.hub_reach import out_of_reach
        from ...formats.hub import SECONDS, api, choose, endpoint

        why = out_of_reach()
        if why is not None:
            return self._cached(name, why, pickles)
        info = api().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=SECONDS)
        if not self._allows(info.id):  # a repository that was moved answers under its new name
            raise ConfigError(f"'{name.repository}' was moved to '{info.id}', which is not allowed here")
        sizes = {file.rfilename: file.size for file in info.siblings or [] if _is_inside(file.rfilename)}
        chosen, opened = choose(sizes, name)
        _refuse_pickles(chosen, name, pickles)
        self._check_size({file: sizes[file] for file in chosen}, name)
        folder = Path(
            snapshot_download(
                name.repository,
                revision=name.revision,  # not the commit: the cache would not know the branch when the hub is away
                allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in chosen],  # they are globs
                endpoint=endpoint(),
                tqdm_class=_silent(),
            )
        )
        if folder.name != info.sha:
            raise AdapterError(f"'{name.repository}' was changed while it was fetched\n  try again")
        return _fetched(folder, opened)

    def _cached(self, name: HubName, why: str, pickles: bool) -> Fetched:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        from ...formats.hub import choose

        try:  # no pattern: no file is asked for
            folder = Path(
                snapshot_download(name.repository, revision=name.revision, local_files_only=True, allow_patterns=[])
            )
        except LocalEntryNotFoundError as error:
            raise _refused(
                f"the hub did not give '{name.repository}': it cannot be reached ({why}), and nothing of it was "
                "fetched before\n  check the network, and HF_ENDPOINT if it is set",
                True,
            ) from error
        sizes: dict[str, int | None] = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        chosen, opened = choose(sizes, name)
        _refuse_pickles(chosen, name, pickles)
        return _fetched(folder, opened)

    def _check_size(self, sizes: dict[str, int | None], name: HubName) -> None:
        from huggingface_hub import constants

        unknown = [file for file, size in sizes.items() if size is None]
        if unknown:
            raise AdapterError(f"the hub does not say how large {unknown[0]} of '{name.repository}' is; not fetched")
        total = sum(size or 0 for size in sizes.values())
        if total > self.most_bytes:
            raise AdapterError(
                f"'{name.repository}' has {total:,} bytes; adapters of at most {self.most_bytes:,} are fetched"
            )
        cache = Path(constants.HF_HUB_CACHE)
        existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if free < total + FREE:
            raise AdapterError(
                f"'{name.repository}' has {total:,} bytes, and the disk of the hub's cache has {free:,} free, of which "
                f"{FREE:,} are kept\n  free some space, or set HF_HOME to a folder on another disk"
            )


def _silent() -> type:
    """Return a progress bar that shows nothing: what a request fetches is not for the server's terminal."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # type: ignore[misc, type-arg]
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _refused(message: str, is_out_of_reach: bool) -> AdapterError:
    """Return the error of a fetch: one that heals by itself, unless this machine's user has set the hub off."""
    heals = is_out_of_reach and "HF_HUB_OFFLINE" not in message
    return Unreachable(message) if heals else AdapterError(message)


def _fetched(folder: Path, opened: str) -> Fetched:
    """folder: .../models--OWNER--NAME/snapshots/COMMIT, whose files are links into .../models--OWNER--NAME/blobs."""
    return Fetched(folder / opened, folder.parent.parent.resolve())


def _is_inside(file: str) -> bool:
    return ".." not in file.split("/") and not file.startswith("/")


def _refuse_pickles(chosen: Sequence[str], name: HubName, pickles: bool) -> None:
    found = next((file for file in chosen if file.endswith(_PICKLES)), None)
    if found is not None and not pickles:
        raise AdapterError(
            f"'{name.repository}' has its weights as a pickle ({found}), which can hold code, and is not fetched\n"
            "  expected safetensors or GGUF: convert it with lorakit convert, and load the result"
        )
