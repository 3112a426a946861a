"""Renew the pins: constraints.txt, constraints-oldest.txt and lorakit/assets/tested.json (`make lock`).

    constraints.txt          the newest releases that fit together and fit pyproject.toml's bounds
    constraints-oldest.txt   pyproject.toml's lower bounds, and the newest releases that fit with them
    tested.json              the first file and the bounds, inside the package: `lorakit doctor` reads them

uv resolves (`uv pip compile`), from the package index alone, so nothing that happens to be installed here has a say:
both files in seconds, where `pip install --dry-run --report` gave the same pins in minutes. `make lock` installs uv
into a folder of its own; only who renews the pins needs it. All extras are resolved together: whoever installs one gets
what was tested with the others.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEWEST, OLDEST, TESTED = (
    ROOT / name for name in ("constraints.txt", "constraints-oldest.txt", "lorakit/assets/tested.json")
)
UV = str(Path(sys.executable).with_name("uv"))
PYTHON = (3, 11)
# Exact, and not "the newest": other spellings may pull several GB of CUDA packages. Change it here to test with another
# release.
TORCH = "torch==2.13.0"
# What a CUDA build of torch brings. torch pins their versions itself, and a CPU build has none of them.
CUDA = re.compile(r"(nvidia|cuda)-|triton$")


def main() -> None:
    if sys.version_info[:2] != PYTHON:
        sys.exit(
            f"the pins are for Python {PYTHON[0]}.{PYTHON[1]}; this is {sys.version.split()[0]}: make lock "
            "PYTHON=python3.11"
        )
    if not Path(UV).exists():
        sys.exit(f"{UV} is missing: run this by `make lock`, which installs it")
    bounds = requirements()
    direct = {canonical(name_of(r)) for r in bounds}
    NEWEST.write_text(constraints(_NEWEST_HEAD, resolve([TORCH, *bounds]), direct), encoding="utf8")
    OLDEST.write_text(constraints(_OLDEST_HEAD, resolve(lower_bounds(bounds)), direct), encoding="utf8")
    TESTED.write_text(json.dumps(tested(), indent=1) + "\n", encoding="utf8")
    print(f"written: {', '.join(str(p.relative_to(ROOT)) for p in (NEWEST, OLDEST, TESTED))}\nnext: make test")


def requirements() -> list[str]:
    """Everything that pyproject.toml names: what the package needs, what each extra adds, and what builds it."""
    project, build = _pyproject()
    extras = project["optional-dependencies"].values()
    return list(dict.fromkeys([*build, *project["dependencies"], *(r for extra in extras for r in extra)]))


def lower_bounds(bounds: list[str]) -> list[str]:
    """Each `name>=x` as `name==x`. ValueError where a requirement has no lower bound."""
    return [f"{name_of(r)}=={lower_bound(r)}" for r in bounds]


def lower_bound(requirement: str) -> str:
    found = re.search(r"[>=]=\s*([\w.]+)", requirement)
    if found is None:
        raise ValueError(f"'{requirement}' in pyproject.toml has no lower bound; expected NAME>=VERSION")
    return found[1]


def resolve(wanted: list[str]) -> dict[str, str]:
    """Versions by name, as uv picks them for an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-config"]
        asked = Path(folder) / "requirements.in"
        asked.write_text("\n".join(wanted) + "\n", encoding="utf8")
        done = subprocess.run(
            [*command, "--python-version", f"{PYTHON[0]}.{PYTHON[1]}", str(asked)], text=True, capture_output=True
        )
    if done.returncode:
        sys.exit(f"{done.stderr.strip()}\nno releases fit together; change a bound in pyproject.toml")
    found = dict(line.split("==") for line in done.stdout.split() if "==" in line)
    # A build's local label ("+cpu") is left out: a pin without it admits every build of that release.
    versions = {canonical(name): version.partition("+")[0] for name, version in found.items()}
    return {name: version for name, version in sorted(versions.items()) if not CUDA.match(name)}


def constraints(head: str, versions: dict[str, str], direct: set[str]) -> str:
    """The text of a constraints file: what pyproject.toml names, then what those need."""
    parts = [
        ("named in pyproject.toml", [f"{n}=={v}" for n, v in versions.items() if n in direct]),
        ("what these need", [f"{n}=={v}" for n, v in versions.items() if n not in direct]),
    ]
    return head + "".join(f"\n# {title}\n" + "".join(f"{pin}\n" for pin in pins) for title, pins in parts)


def tested() -> dict[str, object]:
    """What tested.json holds: the pins and pyproject.toml's bounds."""
    project, _ = _pyproject()
    pins = dict(
        line.split("==") for line in NEWEST.read_text(encoding="utf8").splitlines() if "==" in line and line[0] != "#"
    )
    return {
        "python": project["requires-python"],
        "requires": project["dependencies"],
        "extras": project["optional-dependencies"],
        "versions": pins,
    }


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pyproject() -> tuple[dict[str, object], list[str]]:
    read = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    return read["project"], read["build-system"]["requires"]


_NEWEST_HEAD = """\
# The exact releases that this project is tested with, for Python 3.11: everything that `make demo` and `make test` install, and
# what the extras bring. Use it wherever lorakit is installed: pip install -c constraints.txt .
# Generated: `make lock` writes it anew (scripts/lock.py). Bounds are in pyproject.toml; change those, not this file.
#
# torch: this spelling on purpose; others may pull several GB of CUDA packages. On PyPI its Linux wheels are CUDA builds, whose
# nvidia packages torch pins itself.
# setuptools is here because it builds lorakit and rouge-score: the Makefile installs it first and builds without isolation, as an
# isolated build would take whatever release is out. pip is not: any from 23.2 on will do.
"""
_OLDEST_HEAD = """\
# The oldest releases that pyproject.toml admits, as installed by `make test-oldest`; what these need is as new as fits.
# Generated: `make lock` writes it anew (scripts/lock.py).
"""

if __name__ == "__main__":
    main()
