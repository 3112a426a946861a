"""Write to a temporary folder next to OUT, verify, and only then move into place: after an error OUT is unchanged.

A copy of the base (`into_base`) is written and verified there too, and moved together with the adapter: both or
neither.
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
from . import verify
from .expected import expected
from .into_base import Split
from .logits import Logits, compare, tolerance, why_not

_BUG = "OUT is unchanged; please report this bug"
_IMAGE_FORMATS = ("kohya", "diffusers")


@dataclass(frozen=True)
class Readback:
    """The result of verifying a written file; see `Exported` for the fields."""

    differences: dict[str, float] | None = None
    logits: Logits | None = None
    no_logits: str | None = None


def write_staged(
    adapter: Adapter, ready: Adapter, path: Path, format: str, base: Any, check: bool, parts: Split | None
) -> tuple[Path, Readback]:
    """Write `ready` to `path`. `check`: compare the file with `adapter`, from which `ready` was made, before moving it.

    parts: also write the copy of the base. AdapterError if the file does not match, or something else is in the way.
    """
    parents = (*path.absolute().parents,) if parts is not None else (path.absolute(), *path.absolute().parents)
    existing = next(p for p in parents if p.is_dir())
    with tempfile.TemporaryDirectory(dir=existing, prefix=f".{path.name}.") as name:
        folder = Path(name).resolve()
        staged, copy = folder / path.name, None if parts is None else folder / parts.copy.name
        try:
            written = save(ready, staged, format, base=base)
            # saved once before, so that format errors come before the base is copied
            if parts is not None and copy is not None:
                ready = parts.write(ready, copy)
                written = save(ready, staged, format, base=base)
            result = _verified(adapter, written, format, base, parts, copy) if check else Readback()
        except LorakitError as error:  # name OUT in the message, not the temporary folder
            raise type(error)(str(error).replace(str(folder), str(path.parent))) from error
        to = path.parent / written.relative_to(folder)
        if parts is None or copy is None:
            return _move_into_place(written, to), result
        with _moved(copy, parts.copy):
            return _move_into_place(written, to), result


def _verified(
    adapter: Adapter, written: Path, format: str, base: Any, parts: Split | None, copy: Path | None
) -> Readback:
    stored, intended = verify.contents(written, format, adapter, base)
    differences = verify.differences(stored, intended, written)
    large = {what: value for what, value in differences.items() if not value <= verify.TOLERANCE}
    if large:
        lines = [f"{what} by {value:.2g} of the largest" for what, value in large.items()]
        raise AdapterError(f"{written}, read back, differs from the adapter: {', '.join(lines)}\n  {_BUG}")
    if parts is not None:
        adapter = parts.adapter
    no_logits = (
        "image models' outputs are not compared through a base" if format in _IMAGE_FORMATS else why_not(adapter, base)
    )
    if no_logits is not None:
        return Readback(differences, None, no_logits)
    logits = compare(
        adapter, stored, intended if parts is None else expected(adapter, format), Path(base).expanduser(), copy
    )
    if isinstance(logits, str):
        return Readback(differences, None, logits)
    if not logits.relative <= tolerance(copy):
        through = f"{base}" if copy is None else f"{copy}, against {base} with the adapter"
        raise AdapterError(
            f"{written}, read back, gives different logits through {through}: off by {logits.difference:.2g}, "
            f"{logits.relative:.2g} of"
            f" the largest\n  {_BUG}"
        )
    return Readback(differences, logits)


@contextmanager
def _moved(copy: Path, to: Path) -> Iterator[None]:
    """Move the copy to its final path.

    If the block fails, the previous content is restored; otherwise it is deleted.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    # a killed run leaves it under this name
    old = to.with_name(f".{to.name}.old-{secrets.token_hex(4)}") if to.exists() else None
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


def _move_into_place(written: Path, to: Path) -> Path:
    """Move a file, or a folder's files one by one (other files in OUT stay).

    AdapterError if something is in the way.
    """
    if written.is_file() and to.is_dir():
        raise AdapterError(f"{to} is a folder; expected a file name\n  name another OUT")
    if written.is_dir() and to.is_file():
        raise AdapterError(f"{to} is a file; expected a folder name\n  name another OUT")
    files = {p: to / p.name for p in sorted(written.iterdir())} if written.is_dir() else {written: to}
    parent = to if written.is_dir() else to.parent
    parent.mkdir(parents=True, exist_ok=True)
    blocked = next((final for final in files.values() if final.exists() and not final.is_file()), None)
    if blocked is not None:  # checked before the first file is replaced
        raise AdapterError(
            f"{blocked} is not a file; it would have to be replaced by one\n  move it, or name another OUT"
        )
    for file, final in files.items():
        os.replace(file, final)
    if any(final.name == peft.WEIGHTS for final in files.values()):
        (to / peft.PICKLE).unlink(missing_ok=True)  # otherwise a reader that prefers it gets the old weights
    sync_folder(parent)
    return to
