"""Written under a trial name beside OUT, read again there, and only then put in its place: after an error OUT is as it was.

A copy of the base that takes what the receiver does not (`into_base`) is tried there too, and both are put in place, or none.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import AdapterError, LorakitError
from ..formats import peft, save
from ..io.atomic import sync_folder
from . import verify as again
from .expected import expected
from .into_base import Split
from .logits import Logits, compare, tolerance, why_not

_FAULT = "OUT is as it was; report this: it is a fault of lorakit's"
_OF_IMAGE_MODELS = ("kohya", "diffusers")


@dataclass(frozen=True)
class ReadAgain:
    """See `Exported`."""

    differences: dict[str, float] | None = None
    logits: Logits | None = None
    no_logits: str | None = None


def tried(
    adapter: Adapter, ready: Adapter, path: Path, format: str, base: Any, verify: bool, parts: Split | None
) -> tuple[Path, ReadAgain]:
    """Write `ready`, and (verify) compare what is written with `adapter`, which it was made of."""
    places = (*path.absolute().parents,) if parts is not None else (path.absolute(), *path.absolute().parents)
    there = next(p for p in places if p.is_dir())
    with tempfile.TemporaryDirectory(dir=there, prefix=f".{path.name}.") as name:
        folder = Path(name).resolve()
        trial, copy = folder / path.name, None if parts is None else folder / parts.copy.name
        try:
            written = save(ready, trial, format, base=base)
            if parts is not None and copy is not None:  # what the format cannot hold has been said before a base is copied
                ready = parts.write(ready, copy)
                written = save(ready, trial, format, base=base)
            read = _verified(adapter, written, format, base, parts, copy) if verify else ReadAgain()
        except LorakitError as error:  # the reader knows OUT, and not where it was tried
            raise type(error)(str(error).replace(str(folder), str(path.parent))) from error
        to = path.parent / written.relative_to(folder)
        if parts is None or copy is None:
            return _put_in_place(written, to), read
        with _moved(copy, parts.copy):
            return _put_in_place(written, to), read


def _verified(adapter: Adapter, written: Path, format: str, base: Any, parts: Split | None, copy: Path | None) -> ReadAgain:
    found, wanted = again.contents(written, format, adapter, base)
    differences = again.differences(found, wanted, written)
    far = {what: value for what, value in differences.items() if not value <= again.TOLERANCE}
    if far:
        lines = [f"{what} by {value:.2g} of the largest" for what, value in far.items()]
        raise AdapterError(f"{written}, read again, differs from the adapter: {', '.join(lines)}\n  {_FAULT}")
    if parts is not None:
        adapter = parts.whole
    no_logits = "image models' outputs are not compared through a base" if format in _OF_IMAGE_MODELS else why_not(adapter, base)
    if no_logits is not None:
        return ReadAgain(differences, None, no_logits)
    logits = compare(adapter, found, wanted if parts is None else expected(adapter, format), Path(base).expanduser(), copy)
    if isinstance(logits, str):
        return ReadAgain(differences, None, logits)
    if not logits.relative <= tolerance(copy):
        through = f"{base}" if copy is None else f"{copy}, against {base} with the adapter"
        raise AdapterError(
            f"{written}, read again, gives other logits through {through}: {logits.difference:.2g} apart, {logits.relative:.2g} of the"
            f" largest\n  {_FAULT}"
        )
    return ReadAgain(differences, logits)


@contextmanager
def _moved(copy: Path, to: Path) -> Iterator[None]:
    """The copy under its own name; what was there is back if what follows fails, and else is deleted."""
    to.parent.mkdir(parents=True, exist_ok=True)
    old = to.with_name(f".{to.name}.old-{secrets.token_hex(4)}") if to.exists() else None  # where a killed run's can be found
    if old is not None:
        os.rename(to, old)
    try:
        os.rename(copy, to)
        yield
    except BaseException:
        if to.exists():
            os.rename(to, copy)
        if old is not None:
            os.rename(old, to)
        raise
    sync_folder(to.parent)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _put_in_place(written: Path, to: Path) -> Path:
    """What was tried, under its own name: a file, or a folder's files one by one (what else is in OUT stays)."""
    if written.is_file() and to.is_dir():
        raise AdapterError(f"{to} is a folder, and a file is to be written there")
    if written.is_dir() and to.is_file():
        raise AdapterError(f"{to} is a file, and a folder is to be written there")
    files = {p: to / p.name for p in sorted(written.iterdir())} if written.is_dir() else {written: to}
    parent = to if written.is_dir() else to.parent
    parent.mkdir(parents=True, exist_ok=True)
    wrong = next((final for final in files.values() if final.exists() and not final.is_file()), None)
    if wrong is not None:  # said before the first file is replaced
        raise AdapterError(f"{wrong} is there and is no file, and a file is to be written there")
    for file, final in files.items():
        os.replace(file, final)
    if any(final.name == peft.WEIGHTS for final in files.values()):
        (to / peft.PICKLE).unlink(missing_ok=True)  # else a reader that prefers it would get the old weights
    sync_folder(parent)
    return to
