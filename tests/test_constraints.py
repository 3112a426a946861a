"""What is pinned: everything that is installed, within pyproject.toml's bounds, and the same in the package as in the
files.

`make lock` writes these files (scripts/lock.py); these tests hold that it was run after the last change.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
if not (ROOT / "constraints.txt").exists():
    pytest.skip("constraints.txt is not part of an installed lorakit", allow_module_level=True)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
NAMED = [
    *map(
        Requirement,
        [*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"], *(r for e in EXTRAS.values() for r in e)],
    )
]
FILES = ("constraints.txt", "constraints-oldest.txt")


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("file", FILES)
def test_what_pyproject_names_is_pinned_within_its_bounds(file):
    pinned = pins(file)
    for wanted in NAMED:
        assert pinned[canonicalize_name(wanted.name)] in wanted.specifier, wanted


@pytest.mark.parametrize("file", FILES)
def test_lines_are_exact_pins_that_any_machine_can_install(file):
    for line in (ROOT / file).read_text().splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[a-z\d-]+==[a-z\d.]+", line), line
    assert not [name for name in pins(file) if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    assert "torch==2.13.0" in (ROOT / file).read_text().splitlines()


def test_the_oldest_are_the_lower_bounds():
    oldest = pins("constraints-oldest.txt")
    for wanted in NAMED:
        lowest = min(Version(s.version) for s in wanted.specifier if s.operator in (">=", "=="))
        assert Version(oldest[canonicalize_name(wanted.name)]) == lowest, wanted


def test_the_package_ships_the_same():
    shipped = json.loads((ROOT / "lorakit" / "assets" / "tested.json").read_text())
    assert shipped == {
        "python": PROJECT["requires-python"],
        "requires": PROJECT["dependencies"],
        "extras": EXTRAS,
        "versions": pins("constraints.txt"),
    }


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pins are for Python 3.11")
def test_everything_that_came_with_the_pinned_releases_is_pinned():
    pinned = pins("constraints.txt")
    if any(version_of(canonicalize_name(r.name)) not in (None, pinned[canonicalize_name(r.name)]) for r in NAMED):
        pytest.skip("other releases are installed than the pinned ones")
    cuda = re.compile(r"(nvidia|cuda)-|triton$")  # what torch's CUDA builds bring, pinned by torch
    assert not {name for name in installed_closure() if name not in pinned and not cuda.match(name)}


def installed_closure() -> set[str]:
    """What is installed of what pyproject.toml names and of what that needs, however deep."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = list(NAMED)
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in found or version_of(name) is None:
            continue
        found.add((name, extras))
        needs = map(Requirement, metadata.requires(name) or ())
        waiting += [r for r in needs if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]
    return {name for name, _ in found}


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None
