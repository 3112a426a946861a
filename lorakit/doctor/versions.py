"""Compare the installed libraries with the releases that lorakit is tested with and the bounds it requires.

`assets/tested.json` has both: the releases of constraints.txt and the bounds of pyproject.toml, as neither file is
installed with the package. `make lock` (scripts/lock.py) writes it.
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
# The module to import as a check that a library works, where it is not the library's name. transformers imports lazily:
# only its models' code fails if a dependency does not fit, such as a torchvision built for another torch.
_MODULES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "transformers": "transformers.modeling_utils"}


@dataclass(frozen=True)
class Library:
    """A library and its versions. `needed`: our bounds. `why`: why its import fails."""

    name: str
    installed: str | None
    tested: str | None
    needed: str
    state: State
    why: str = ""

    @property
    def fix(self) -> str:
        """The command to type if the library is missing, out of bounds or broken; otherwise empty."""
        if self.state not in BAD:
            return ""
        force = "--force-reinstall " if self.state == "broken" else ""
        requirement = f"{self.name}=={self.tested}" if self.tested else self.name + self.needed
        return f"pip install {force}'{requirement}'"


@dataclass(frozen=True)
class Extra:
    """An optional dependency group (`pip install 'lorakit[NAME]'`) and its libraries."""

    name: str
    libraries: list[Library]

    @property
    def lacking(self) -> list[str]:
        """The libraries that are missing, out of bounds or broken."""
        return [lib.name for lib in self.libraries if lib.state in BAD]

    @property
    def fix(self) -> str:
        """The command that installs what is lacking; empty if nothing is."""
        return f"pip install 'lorakit[{self.name}]'" if self.lacking else ""


def python() -> Library:
    """Judge the Python interpreter as if it were a library."""
    from packaging.specifiers import SpecifierSet

    version, needed = platform.python_version(), _tested()["python"]
    fits = SpecifierSet(needed).contains(version, prereleases=True)
    return Library("python", version, None, needed, "untested" if fits else "outside")


def required() -> list[Library]:
    """Judge the required libraries. Imports each of them, so this takes seconds."""
    return [importable(lib) for lib in _libraries(_tested()["requires"])]


def extras() -> list[Extra]:
    """Judge the libraries of each extra, without importing them."""
    return [Extra(name, list(_libraries(requirements))) for name, requirements in _tested()["extras"].items()]


def pins() -> str:
    """Return the tested releases as a constraints file for pip."""
    return "".join(f"{name}=={version}\n" for name, version in _tested()["versions"].items())


def installed(name: str) -> str | None:
    """Return a distribution's installed version, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge(requirement: str, here: str | None, tested: str | None) -> Library:
    """Judge the installed version of a requirement, None if it is missing. Local labels (2.13.0+cpu) are ignored."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    parsed = Requirement(requirement)
    name, needed = _canonical(parsed.name), requirement.removeprefix(parsed.name).strip()
    if here is None:
        return Library(name, None, tested, needed, "missing")
    if not parsed.specifier.contains(here, prereleases=True):
        return Library(name, here, tested, needed, "outside")
    if tested is None:
        return Library(name, here, None, needed, "untested")
    current, reference = Version(Version(here).public), Version(tested)
    state: State = "tested" if current == reference else "newer" if current > reference else "older"
    return Library(name, here, tested, needed, state)


def importable(library: Library) -> Library:
    """Return `library`, as broken if it is installed but cannot be imported."""
    if library.state == "missing":
        return library
    try:
        importlib.import_module(_MODULES.get(library.name, library.name))
    except Exception as error:  # incompatible libraries raise anything: ImportError, AttributeError, RuntimeError
        message = next(iter(str(error).strip().splitlines()), "")
        why = f"{type(error).__name__}: {message}"
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
