"""The installed libraries against what lorakit is tested with and what it needs.

`assets/tested.json` holds both: constraints.txt's releases and pyproject.toml's bounds, since neither file is installed with the
package (`make lock` writes it, scripts/lock.py).
"""

from __future__ import annotations

import importlib
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["tested", "newer", "older", "untested", "missing", "outside", "broken"]
BAD: tuple[State, ...] = ("missing", "outside", "broken")
# What is imported to see that a library works, where that is not its name. transformers imports its parts when they are used;
# its models' code is what fails where something it needs does not fit, such as a torchvision that was built for another torch.
_MODULES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "transformers": "transformers.modeling_utils"}


@dataclass(frozen=True)
class Library:
    """One library. `needed`: our bounds. `fix`: what to type if it is missing, outside them or broken."""

    name: str
    installed: str | None
    tested: str | None
    needed: str
    state: State
    why: str = ""

    @property
    def fix(self) -> str:
        if self.state not in BAD:
            return ""
        again = "--force-reinstall " if self.state == "broken" else ""
        return f"pip install {again}'{f'{self.name}=={self.tested}' if self.tested else self.name + self.needed}'"


@dataclass(frozen=True)
class Extra:
    """An optional part of lorakit and the libraries that it needs."""

    name: str
    libraries: list[Library]

    @property
    def lacking(self) -> list[str]:
        return [lib.name for lib in self.libraries if lib.state in BAD]

    @property
    def fix(self) -> str:
        return f"pip install 'lorakit[{self.name}]'" if self.lacking else ""


def python() -> Library:
    """The interpreter, judged as a library is."""
    from packaging.specifiers import SpecifierSet

    here, needed = platform.python_version(), _tested()["python"]
    fits = SpecifierSet(needed).contains(here, prereleases=True)
    return Library("python", here, None, needed, "untested" if fits else "outside")


def required() -> list[Library]:
    """What lorakit does not work without. Each library is imported, so this takes seconds."""
    return [importable(lib) for lib in _libraries(_tested()["requires"])]


def extras() -> list[Extra]:
    """What each extra adds; nothing is imported."""
    return [Extra(name, list(_libraries(requirements))) for name, requirements in _tested()["extras"].items()]


def pins() -> str:
    """The tested releases as a constraints file for pip."""
    return "".join(f"{name}=={version}\n" for name, version in _tested()["versions"].items())


def installed(name: str) -> str | None:
    """A distribution's version, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge(requirement: str, here: str | None, tested: str | None) -> Library:
    """A library by the version that is installed, if any. A build's local label (2.13.0+cpu) does not count."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    wants = Requirement(requirement)
    name, needed = _canonical(wants.name), requirement.removeprefix(wants.name).strip()
    if here is None:
        return Library(name, None, tested, needed, "missing")
    if not wants.specifier.contains(here, prereleases=True):
        return Library(name, here, tested, needed, "outside")
    if tested is None:
        return Library(name, here, None, needed, "untested")
    mine, theirs = Version(Version(here).public), Version(tested)
    return Library(name, here, tested, needed, "tested" if mine == theirs else "newer" if mine > theirs else "older")


def importable(library: Library) -> Library:
    """The same, or broken if it is installed and its import fails."""
    if library.state == "missing":
        return library
    try:
        importlib.import_module(_MODULES.get(library.name, library.name))
    except Exception as error:  # a library that does not fit another fails with anything: ImportError, AttributeError, RuntimeError
        said = next(iter(str(error).strip().splitlines()), "")
        why = f"{type(error).__name__}: {said}"
        return Library(library.name, library.installed, library.tested, library.needed, "broken", why)
    return library


def _libraries(requirements: list[str]) -> Iterator[Library]:
    for requirement in requirements:
        name = _canonical(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
        yield judge(requirement, installed(name), _tested()["versions"].get(name))


@cache
def _tested() -> dict[str, Any]:
    return json.loads((Path(__file__).parent.parent / "assets" / "tested.json").read_text(encoding="utf8"))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
