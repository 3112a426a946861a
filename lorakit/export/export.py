"""`export`: check, mend, write, and read again.

With `verify` the file is first written into a temporary folder beside OUT, read again there, and put in its place only if it is what it
should be: one that is not leaves OUT as it was.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import AdapterError, ConfigError, LorakitError, did_you_mean
from ..formats import peft, save
from ..formats.files import sync_folder, write_text
from . import verify as again
from .into_base import divide, merged_into
from .logits import TOLERANCE as LOGITS_TOLERANCE
from .logits import Logits, compare, why_not
from .rules import RECEIVERS, Finding, findings

_FAULT = "OUT is as it was; report this: it is a fault of lorakit's"
_OF_IMAGE_MODELS = ("kohya", "diffusers")


@dataclass(frozen=True)
class Exported:
    """What was written, and, if verified, how far it is from the adapter.

    `differences`: of ΔW, DoRA's magnitudes, changes of biases, saved weights, as far as the adapter has them: the largest, relative (see
    `verify`). `difference`: the largest of these. `logits`: through the base, or `no_logits`: why they were not compared.
    """

    receiver: str
    format: str
    files: list[Path]
    mended: list[str] = field(default_factory=list)
    differences: dict[str, float] | None = None
    logits: Logits | None = None
    no_logits: str | None = None
    base: Path | None = None  # the copy of the base that holds what the receiver does not take

    @property
    def difference(self) -> float | None:
        return max(self.differences.values()) if self.differences else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "receiver": self.receiver, "format": self.format, "files": [str(f) for f in self.files], "mended": self.mended,
            "difference": self.difference, "differences": self.differences,
            "logits": {**asdict(self.logits), "relative": self.logits.relative} if self.logits else None, "no_logits": self.no_logits,
            "base": str(self.base) if self.base else None,
        }  # fmt: skip


def export(
    adapter: Adapter,
    out: str | Path,
    receiver: str,
    *,
    fix: bool = False,
    verify: bool = False,
    base: Any = None,
    model: str | None = None,
    force: bool = False,
) -> Exported:
    """Write `adapter` as `receiver` reads it (see `RECEIVERS`).

    fix: mend what can be mended without changing the effect; with the base's folder as `base`, what the receiver does not take at all is
    merged into a copy of it, OUT-base (`force` replaces one that is there). verify: read the result again, independently, and compare all that it does
    to a base; through `base`, if that is a language model's folder with its weights, the logits too. base: the base's folder or config,
    which llama.cpp's names and row orders need. model: what Ollama's Modelfile says FROM.
    Raises AdapterError with all that the receiver does not take, each with its way out, or with what is wrong in the written file;
    OUT is then as it was.
    """
    if receiver not in RECEIVERS:
        raise ConfigError(f"no receiver '{receiver}'{did_you_mean(receiver, RECEIVERS)}\n  known: {', '.join(RECEIVERS)}")
    target, path, mended = RECEIVERS[receiver], Path(out).expanduser(), []
    ready, part, copy = adapter.check(), None, path.with_name(f"{path.name}-base")
    names = {n for f in findings(ready, receiver) if f.mend is None for n in f.into_base}
    if fix and names and target.format != "gguf" and isinstance(base, str | Path):
        part, adapter = divide(ready, names)
        ready = adapter
    found = findings(ready, receiver)
    for _ in found:  # mending one may mend, or show, another
        finding = next((f for f in findings(ready, receiver) if f.mend is not None), None)
        if not fix or finding is None or finding.mend is None:
            break
        ready = finding.mend(ready)
        mended.append(f"{finding.what}: {finding.way_out}")
    left = findings(ready, receiver)
    if left:
        raise AdapterError(_refusal(receiver, left))
    if part is not None:
        ready = adapter = merged_into(Path(base).expanduser(), part, adapter, copy, force)
        base = copy
        mended.insert(0, f"{len(part.updates) + len(part.saved)} modules and weights that {receiver} does not take: merged into {copy}")
    if receiver == "ollama":
        if model is None:
            raise ConfigError("Ollama's Modelfile starts FROM a model: say which (--model llama3.2, or a GGUF file)")
        path = path if path.suffix == ".gguf" else path / "adapter.gguf"
    differences, logits, no_logits = None, None, None
    if verify:
        written, differences, logits, no_logits = _save_verified(adapter, ready, path, target.format, base)
    else:
        written = save(ready, path, target.format, base=base)
    files = [written]
    if receiver == "ollama":
        modelfile = written.parent / "Modelfile"
        write_text(modelfile, f"FROM {model}\nADAPTER ./{written.name}\n")
        files.append(modelfile)
    return Exported(receiver, target.format, files, mended, differences, logits, no_logits, copy if part is not None else None)


def _save_verified(
    adapter: Adapter, ready: Adapter, path: Path, format: str, base: Any
) -> tuple[Path, dict[str, float], Logits | None, str | None]:
    """Write `ready`, and compare what is written with `adapter`."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    with tempfile.TemporaryDirectory(dir=there, prefix=f".{path.name}.") as folder:
        trial = Path(folder) / path.name
        try:
            written = save(ready, trial, format, base=base)
            result = _verified(adapter, written, format, base)
        except LorakitError as error:  # the reader knows OUT, and not where it was tried
            raise type(error)(str(error).replace(str(trial), str(path))) from error
        return _put_in_place(written, path.parent / written.relative_to(folder)), *result


def _verified(adapter: Adapter, written: Path, format: str, base: Any) -> tuple[dict[str, float], Logits | None, str | None]:
    found, wanted = again.contents(written, format, adapter, base)
    differences = again.differences(found, wanted, written)
    far = {what: value for what, value in differences.items() if not value <= again.TOLERANCE}
    if far:
        lines = [f"{what} by {value:.2g} of the largest" for what, value in far.items()]
        raise AdapterError(f"{written}, read again, differs from the adapter: {', '.join(lines)}\n  {_FAULT}")
    no_logits = "image models' outputs are not compared through a base" if format in _OF_IMAGE_MODELS else why_not(adapter, base)
    if no_logits is not None:
        return differences, None, no_logits
    logits = compare(adapter, found, wanted, Path(base).expanduser())
    if isinstance(logits, str):
        return differences, None, logits
    if not logits.relative <= LOGITS_TOLERANCE:
        raise AdapterError(
            f"{written}, read again, gives other logits through {base}: {logits.difference:.2g} apart, {logits.relative:.2g} of the largest\n"
            f"  {_FAULT}"
        )
    return differences, logits, None


def _put_in_place(written: Path, to: Path) -> Path:
    """What was tried, under its own name: a file, or a folder's files one by one (what else is in OUT stays)."""
    if written.is_file() and to.is_dir():
        raise AdapterError(f"{to} is a folder, and a file is to be written there")
    if written.is_dir() and to.is_file():
        raise AdapterError(f"{to} is a file, and a folder is to be written there")
    files = {p: to / p.name for p in sorted(written.iterdir())} if written.is_dir() else {written: to}
    parent = to if written.is_dir() else to.parent
    parent.mkdir(parents=True, exist_ok=True)
    for file, final in files.items():
        os.replace(file, final)
    if any(final.name == peft.WEIGHTS for final in files.values()):
        (to / peft.PICKLE).unlink(missing_ok=True)  # else a reader that prefers it would get the old weights
    sync_folder(parent)
    return to


def _refusal(receiver: str, left: list[Finding]) -> str:
    def does_it(f: Finding) -> str:
        if f.mend is not None:
            return " (--fix does it)"
        return " (--fix with --base FOLDER does it, in a copy of the base)" if f.into_base and RECEIVERS[receiver].format != "gguf" else ""

    lines = [f"{f.what}\n    {f.way_out}{does_it(f)}" for f in left]
    if RECEIVERS[receiver].format == "gguf":
        lines.append("--merged --base FOLDER writes base and adapter as one GGUF model, whatever the adapter is")
    return f"{receiver} does not take this adapter:\n  " + "\n  ".join(lines)
