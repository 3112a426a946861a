"""`export`: check, mend, write, and read again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import AdapterError, ConfigError, did_you_mean
from ..formats import save
from ..formats.files import write_text
from .rules import RECEIVERS, Finding, findings
from .verify import expected, largest_difference

TOLERANCE = 1e-5  # of the largest |ΔW|: float32 rounding of strengths folded into B


@dataclass(frozen=True)
class Exported:
    """What was written. `difference`: the largest between ΔW in the file and the adapter's, over the largest |ΔW|; None if not verified.

    `uncompared`: modules whose numbers it does not cover: LoHa, LoKr, whole updates, and magnitudes of DoRA.
    """

    receiver: str
    format: str
    files: list[Path]
    mended: list[str] = field(default_factory=list)
    difference: float | None = None
    uncompared: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "receiver": self.receiver, "format": self.format, "files": [str(f) for f in self.files], "mended": self.mended,
            "difference": self.difference, "uncompared": self.uncompared,
        }  # fmt: skip


def export(
    adapter: Adapter, out: str | Path, receiver: str, *, fix: bool = False, verify: bool = False, base: Any = None, model: str | None = None
) -> Exported:
    """Write `adapter` as `receiver` reads it (see `RECEIVERS`).

    fix: mend what can be mended without changing the effect. verify: read the result again, independently, and compare ΔW. base: the
    base's folder or config, which llama.cpp's names and row orders need. model: what Ollama's Modelfile says FROM.
    Raises AdapterError with all that the receiver does not take, each with its way out; nothing is written then.
    """
    if receiver not in RECEIVERS:
        raise ConfigError(f"no receiver '{receiver}'{did_you_mean(receiver, RECEIVERS)}\n  known: {', '.join(RECEIVERS)}")
    target, mended = RECEIVERS[receiver], []
    ready = adapter.check()
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
    path = Path(out).expanduser()
    if receiver == "ollama":
        if model is None:
            raise ConfigError("Ollama's Modelfile starts FROM a model: say which (--model llama3.2, or a GGUF file)")
        path = path if path.suffix == ".gguf" else path / "adapter.gguf"
    written = save(ready, path, target.format, base=base)
    files = [written]
    difference = None
    if verify:
        difference = largest_difference(written, target.format, expected(adapter, target.format, base))
        if difference > TOLERANCE:
            raise AdapterError(
                f"{written}, read again, differs from the adapter: ΔW by {difference:.2g} of its largest\n  do not use it, and report this: it is a fault of lorakit's"
            )
    if receiver == "ollama":
        modelfile = written.parent / "Modelfile"
        write_text(modelfile, f"FROM {model}\nADAPTER ./{written.name}\n")
        files.append(modelfile)
    uncompared = len(adapter.others) + sum(f.magnitude is not None for f in adapter.factors.values())
    return Exported(receiver, target.format, files, mended, difference, uncompared if verify else 0)


def _refusal(receiver: str, left: list[Finding]) -> str:
    lines = [f"{f.what}\n    {f.way_out}" + (" (--fix does it)" if f.mend is not None else "") for f in left]
    return f"{receiver} does not take this adapter:\n  " + "\n  ".join(lines)
