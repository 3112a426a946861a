"""`export`: check, mend, write, and read again (`tried`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import AdapterError, ConfigError, did_you_mean
from ..formats import save
from ..io.atomic import write_text
from .into_base import split
from .logits import Logits
from .modelfile import check_place, modelfile
from .rules import RECEIVERS, Finding, findings
from .tried import ReadAgain, tried


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
    source: Path | None = None,
) -> Exported:
    """Write `adapter` as `receiver` reads it (see `RECEIVERS`).

    fix: mend what can be mended without changing the effect; with the base's folder as `base`, what the receiver does not take at all is
    merged into a copy of it, OUT-base. verify: read the result again, independently, and compare all that it does to a base; through
    `base`, if that is a language model's folder with its weights, the logits too: of `base` + `adapter` against OUT-base + OUT, where there
    is that copy. base: the base's folder or config, which llama.cpp's names and row orders need. model: what Ollama's Modelfile says FROM.
    force: replace an OUT-base, and a Modelfile beside OUT, that are there; never what holds `source`, where the adapter was read from.
    Raises AdapterError with all that the receiver does not take, each with its way out, or with what is wrong in the written file;
    OUT is then as it was.
    """
    if receiver not in RECEIVERS:
        raise ConfigError(f"no receiver '{receiver}'{did_you_mean(receiver, RECEIVERS)}\n  known: {', '.join(RECEIVERS)}")
    target, path, adapter = RECEIVERS[receiver], Path(out).expanduser(), adapter.check()
    names = {n for f in findings(adapter, receiver) if f.mend is None for n in f.into_base}
    parts = None
    if fix and names and target.format != "gguf" and isinstance(base, str | Path):
        parts = split(adapter, names, Path(base).expanduser(), path, force, source)
        adapter = parts.rest
    ready, mended = _mended(adapter, receiver) if fix else (adapter, [])
    left = findings(ready, receiver)
    if left:
        raise AdapterError(_refusal(receiver, left))
    if parts is not None:
        count = len(parts.part.updates) + len(parts.part.saved)
        mended.insert(0, f"{count} modules and weights that {receiver} does not take: merged into {parts.copy}")
    beside = None
    if receiver == "ollama":
        if model is None:
            raise ConfigError("Ollama's Modelfile starts FROM a model: say which (--model llama3.2, or a GGUF file)")
        path = path if path.suffix == ".gguf" else path / "adapter.gguf"
        beside = check_place(path, modelfile(path, model), force)
    if verify or parts is not None:
        written, read = tried(adapter, ready, path, target.format, base, verify, parts)
    else:
        written, read = save(ready, path, target.format, base=base), ReadAgain()
    files = [written]
    if beside is not None:
        write_text(beside, modelfile(path, model))
        files.append(beside)
    copy = parts.copy if parts is not None else None
    return Exported(receiver, target.format, files, mended, read.differences, read.logits, read.no_logits, copy)


def _mended(adapter: Adapter, receiver: str) -> tuple[Adapter, list[str]]:
    """(the adapter after all that can be mended, what that was)."""
    mended = []
    for _ in RECEIVERS[receiver].rules:  # mending one may mend, or show, another; none comes twice
        finding = next((f for f in findings(adapter, receiver) if f.mend is not None), None)
        if finding is None or finding.mend is None:
            break
        adapter = finding.mend(adapter)
        mended.append(f"{finding.what}: {finding.way_out}")
    return adapter, mended


def _refusal(receiver: str, left: list[Finding]) -> str:
    def does_it(f: Finding) -> str:
        if f.mend is not None:
            return " (--fix does it)"
        return " (--fix with --base FOLDER does it, in a copy of the base)" if f.into_base and RECEIVERS[receiver].format != "gguf" else ""

    lines = [f"{f.what}\n    {f.way_out}{does_it(f)}" for f in left]
    if RECEIVERS[receiver].format == "gguf":
        lines.append("--merged --base FOLDER writes base and adapter as one GGUF model, whatever the adapter is")
    return f"{receiver} does not take this adapter:\n  " + "\n  ".join(lines)
