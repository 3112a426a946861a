"""Where an adapter's files are: below an allowed root, on the hub, or anywhere on this machine for the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import AdapterError, ConfigError
from .guard.adapter_files import HTTP, LOCAL
from .guard.hub import Hub
from .guard.roots import Roots, check_place
from .sources import AdapterFiles, files_at

MOST_FOLDERS = 100_000  # that are looked through below the roots
MOST_LEVELS = 8
CONFIG, RUN = "adapter_config.json", "config.yaml"
_WEIGHTS = (
    "adapter_model",
    "adapters",
)  # beginnings of the names of weights beside a config: PEFT's, its shards, MLX's
_FILES = (".safetensors", ".gguf")  # an adapter that is one file
# What models and trainers call their files; none of them is an adapter.
_OTHERS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|consolidated(\.\d+)?|optimizer|adapter_model|adapters)"
    r"(-\d{5}-of-\d{5})?\.\w+"
)

Locate = Callable[[], AdapterFiles]  # not for the event loop's thread: it may download; raises AdapterError


@dataclass(frozen=True)
class Locations:
    """Finds adapters by what a client or the command line says.

    roots, hub: what is allowed over HTTP. pickles: whether the command line may name pickles.
    """

    roots: Roots
    hub: Hub
    pickles: bool = False

    def over_http(self, place: str, label: str) -> AdapterFiles:
        """Return the files of a place below a root, or of an allowed hub id. Not for the event loop's thread.

        Raises AdapterError and ConfigError, without any absolute path.
        """
        if not self.roots and not self.hub:
            raise ConfigError(
                "this server loads nothing over HTTP\n"
                "  start it with --adapters FOLDER, or with --hub OWNER, to load adapters from there"
            )
        if not place.startswith("hf://"):
            check_place(place)
            located = self.roots.locate(place) if self.roots else None
            if located is not None:
                root, path = located
                return files_at(path, label, root, HTTP)
        if self.hub.is_place(place) and (self.hub or place.startswith("hf://")):
            fetched = self.hub.fetch(place)
            return files_at(fetched.path, label, fetched.boundary, HTTP)
        raise AdapterError(
            f"there is nothing at '{place}' below the folders that adapters are loaded from\n"
            "  expected a path relative to a folder that the server was started with (--adapters)"
            + (", or OWNER/NAME of the hub" if self.hub else "")
        )

    def on_command_line(self, path: str, label: str) -> tuple[str, Locate]:
        """Decide whether a text is a path on this machine or a hub id. Return (its public form, what finds its files).

        Decided once: if a folder is gone later, its path must not be asked of the hub, where it may be a stranger's
        repository. Requests run what is returned too, so its errors show no path. Raises AdapterError if it is neither.
        """
        rules = replace(LOCAL, pickles=self.pickles)
        here = Path(path).expanduser().absolute()

        def of_this_machine() -> AdapterFiles:
            if not here.exists():
                raise AdapterError(
                    f"the files of adapter '{label}' are gone\n  put them back where the server was started with them"
                )
            return files_at(here.resolve(), label, None, rules)

        def of_the_hub() -> AdapterFiles:
            owner = path.removeprefix("hf://").split("/")[0]
            fetched = Hub([owner]).fetch(path, pickles=self.pickles)
            return files_at(fetched.path, label, fetched.boundary, rules)

        if here.exists():
            return here.name, of_this_machine
        if self.hub.is_place(path):
            return path, of_the_hub
        raise AdapterError(f"adapter '{label}': there is no file or folder {path}\n  expected NAME=PATH")

    def below_roots(self) -> Iterator[tuple[str, str, int]]:
        """Yield (name, place, when it was written in seconds since 1970) of each adapter below the roots.

        The name is the path relative to its root, without the suffix of a single file. Hidden folders, links to folders
        and what is deeper than MOST_LEVELS are left out. The first root that has a name counts.
        """
        seen: set[str] = set()
        for root in self.roots.folders:
            for place, changed in _adapters_in(root):
                name = os.path.splitext(place)[0] if place.endswith(_FILES) else place
                name = place if name in seen else name
                if name not in seen:
                    seen.add(name)
                    yield name, place, changed


def _adapters_in(root: Path) -> Iterator[tuple[str, int]]:
    """Yield (path relative to the root, when it was written), folders before files of the same name."""
    folders = [(root, "", 0)]
    for count, (folder, relative, level) in enumerate(folders):  # grows while it is read
        if count >= MOST_FOLDERS:
            return
        inner, files = _listed(folder)
        if relative and _is_adapter(files):
            yield relative, _written(folder / CONFIG)
            continue
        if relative and RUN in files:  # a run: its result, once there is one
            if _is_adapter(_listed(folder / "adapter")[1]):
                yield relative, _written(folder / "adapter" / CONFIG)
            continue
        above = f"{relative}/" if relative else ""
        for name in sorted(files):
            if name.endswith(_FILES) and not _OTHERS.fullmatch(name):
                yield above + name, _written(folder / name)
        if level < MOST_LEVELS:
            folders += [(folder / name, above + name, level + 1) for name in sorted(inner)]


def _listed(folder: Path) -> tuple[list[str], set[str]]:
    """Return the names of the folders and files in a folder, without hidden ones and links to folders."""
    inner: list[str] = []
    files: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inner.append(entry.name)
                elif entry.is_file():
                    files.add(entry.name)
    except OSError:  # no permission, or deleted meanwhile: nothing there for us
        return [], set()
    return inner, files


def _is_adapter(files: set[str]) -> bool:
    return CONFIG in files and any(name.startswith(_WEIGHTS) for name in files)


def _written(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0
