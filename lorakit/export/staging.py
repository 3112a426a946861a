"""Write beside OUT, verify, and only then move into place (`io.staging`): after an error OUT is unchanged.

A copy of the base (`into_base`) is written and verified there too, and moved together with the adapter: both or
neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..errors import AdapterError
from ..formats import FOLDERS, save, stale
from ..formats.kohya import written_for
from ..io.atomic import write_text
from ..io.staging import staged
from ..io.tensors import write_tensors
from . import image_programs, verify
from .arrays import header
from .expected import expected
from .into_base import Split
from .logits import Logits, compare, tolerance, why_not

_BUG = "OUT is unchanged; please report this bug"
_IMAGE_FORMATS = ("kohya", "diffusers", "comfyui")


@dataclass(frozen=True)
class Readback:
    """The result of verifying a written file; see `Exported` for the fields."""

    differences: dict[str, float] | None = None
    logits: Logits | None = None
    no_logits: str | None = None
    placed: image_programs.Placed | None = None


@dataclass(frozen=True)
class Beside:
    """More files by name. `texts`, `tensors`: beside OUT; `inside`: texts in it, if it is a folder."""

    texts: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)


def write_staged(
    adapter: Adapter,
    ready: Adapter,
    path: Path,
    format: str,
    base: Any,
    check: bool,
    parts: Split | None,
    beside: Beside,
    program: str,
) -> tuple[Path, Readback]:
    """Write `ready` to `path`. `check`: compare the file with `adapter`, from which `ready` was made, before moving it.

    parts: also write the copy of the base. program: the receiver; an image program must find every key of the file.
    Raises AdapterError if it would not, the file does not match, or something else is in the way.
    """
    _check_kind(path, format)
    with staged(path, stale(format, path)) as target:
        copy = None if parts is None else target.with_name(parts.copy.name)
        written = save(ready, target, format, base=base)
        # saved once before, so that format errors come before the base is copied
        if parts is not None and copy is not None:
            ready = parts.write(ready, copy)
            written = save(ready, target, format, base=base)
        result = _verified(adapter, written, format, base, parts, copy) if check else Readback()
        if program in image_programs.PROGRAMS:
            keys = [key for key in header(written) if key != "__metadata__"]
            result = replace(result, placed=image_programs.check(program, written_for(ready), keys))
        for name, text in beside.texts.items():
            write_text(target.with_name(name), text)
        for name, tensors in beside.tensors.items():
            write_tensors(target.with_name(name), tensors, {"format": "pt"})
        for name, text in beside.inside.items() if target.is_dir() else ():
            write_text(target / name, text)
    return path / written.relative_to(target), result


def _check_kind(path: Path, format: str) -> None:
    if path.is_dir() and format not in (*FOLDERS, "diffusers"):
        raise AdapterError(f"{path} is a folder; expected a file name\n  name another OUT")
    if path.is_file() and format in FOLDERS:
        raise AdapterError(f"{path} is a file; expected a folder name\n  name another OUT")


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
