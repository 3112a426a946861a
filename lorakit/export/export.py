"""`export`: check an adapter, fix it, write it, and read it back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import ONLY_ON
from ..bases.rope import record_of
from ..data.chat_record import TEMPLATE_FILE, ChatRecord
from ..errors import AdapterError, ConfigError, did_you_mean
from ..formats.bundled import own_files
from ..formats.pipeline_names import in_pipeline
from .image_programs import SEPARATE_TOKENS, Placed, format_for, token_notes
from .into_base import split
from .logits import Logits
from .modelfile import check_modelfile, modelfile
from .rules import RECEIVERS, Finding, findings
from .staging import Beside, write_staged


@dataclass(frozen=True)
class Exported:
    """What was written and, if verified, how far it is from the adapter.

    mended: the fixes applied. notes: what the files do not hold, so that it must be given to the program.
    differences: the largest relative difference of ΔW, DoRA's magnitudes, changes of biases and saved weights, as far
        as the adapter has them (see `verify`); `difference` is the largest of these.
    logits: compared through the base, or no_logits: why they were not.
    """

    receiver: str
    format: str
    files: list[Path]
    mended: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differences: dict[str, float] | None = None
    logits: Logits | None = None
    no_logits: str | None = None
    base: Path | None = None  # the copy of the base with what the receiver does not accept
    unchecked: str | None = None  # what could not be checked without a base
    placed: Placed | None = None  # what an image program reads of the file, where that is known

    @property
    def difference(self) -> float | None:
        return max(self.differences.values()) if self.differences else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "receiver": self.receiver,
            "format": self.format,
            "files": [str(f) for f in self.files],
            "mended": self.mended,
            "notes": self.notes,
            "difference": self.difference,
            "differences": self.differences,
            "logits": {**asdict(self.logits), "relative": self.logits.relative} if self.logits else None,
            "no_logits": self.no_logits,
            "base": str(self.base) if self.base else None,
            "unchecked": self.unchecked,
            "placed": dict(self.placed.read) if self.placed else None,
        }


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
    """Write `adapter` for the program `receiver` (see `RECEIVERS`).

    fix: apply the fixes that do not change the effect. If `base` is the base's folder, also merge what the receiver
        does not accept into a copy of it, OUT-base.
    verify: read the result back with independent code and compare everything it does to a base. If `base` is a language
        model's folder with weights, also compare logits: `base` + `adapter` against OUT-base (or `base`) + OUT.
    base: the base's folder or config; llama.cpp's names and row order depend on it.
    model: what Ollama's Modelfile starts FROM.
    force: replace an existing OUT-base and a Modelfile next to OUT, but never a folder that contains `source`.
    source: the path the adapter was read from.

    Raises AdapterError, which lists everything the receiver does not accept, each with a way out, or what is wrong in
    the written file. Raises ConfigError for an unknown receiver, Ollama without `model`, or OUT with a name that the
    receiver does not list or that a token's own file has. OUT is unchanged after an error.
    """
    if receiver not in RECEIVERS:
        raise ConfigError(
            f"no receiver '{receiver}'{did_you_mean(receiver, RECEIVERS)}\n  known: {', '.join(RECEIVERS)}"
        )
    path, adapter = Path(out).expanduser(), in_pipeline(adapter.check())
    format = format_for(receiver, RECEIVERS[receiver].format, adapter)
    if format in ("kohya", "comfyui") and path.suffix != ".safetensors":
        raise ConfigError(f"{receiver} lists .safetensors files alone\n  name OUT {path}.safetensors")
    unfixable = {n for f in findings(adapter, receiver) if f.fix is None for n in f.into_base}
    parts = None
    if fix and unfixable and format != "gguf" and isinstance(base, str | Path):
        parts = split(adapter, unfixable, Path(base).expanduser(), path, force, source)
        adapter = parts.rest
    ready, fixes = _fixed(adapter, receiver) if fix else (adapter, [])
    refused = findings(ready, receiver)
    if refused:
        raise AdapterError(_refusal(receiver, refused))
    if parts is not None:
        count = len(parts.part.updates) + len(parts.part.saved)
        fixes.insert(0, f"{count} modules and weights that {receiver} does not accept: merged into {parts.copy}")
    model_file, beside = None, {}
    if receiver == "ollama":
        if model is None:
            raise ConfigError(
                "Ollama's Modelfile needs a model to start FROM\n  name one: --model llama3.2, or a GGUF file"
            )
        path = path if path.suffix == ".gguf" else path / "adapter.gguf"
        text = modelfile(path, model, adapter)
        model_file = check_modelfile(path, text, force)
        beside = {model_file.name: text}
    record = ChatRecord.of(adapter.metadata)
    inside = {} if record.template is None else {TEMPLATE_FILE: record.template}
    tokens = own_files(ready.embeddings) if receiver in SEPARATE_TOKENS else {}
    _check_names(path, tokens)
    _check_free([path.parent / name for name in tokens], force)
    token_lines = token_notes(receiver, ready, tokens) if tokens else []
    if tokens:
        adapter, ready = replace(adapter, embeddings={}), replace(ready, embeddings={})
    written, check = write_staged(
        adapter, ready, path, format, base, verify, parts, Beside(beside, inside, tokens), receiver
    )
    files = [written, *([model_file] if model_file is not None else []), *(path.parent / name for name in tokens)]
    files += [written / name for name in inside if written.is_dir()]
    copy = parts.copy if parts is not None else None
    needed = adapter.metadata.get(ONLY_ON)
    notes = [f"it is right on a base quantized as {needed} only (LoftQ): serve it on that"] if needed else []
    notes += _scaled_positions(adapter)
    notes += record.to_pass_on(with_template=written.is_dir()) + token_lines
    unchecked = _unchecked(ready) if base is None and check.placed is None else None
    return Exported(
        receiver,
        format,
        files,
        fixes,
        notes,
        check.differences,
        check.logits,
        check.no_logits,
        copy,
        unchecked,
        check.placed,
    )


def _scaled_positions(adapter: Adapter) -> list[str]:
    """Say that the adapter is for a base with scaled positions, which the receiver must be given too."""
    scaling = record_of(adapter.metadata)
    if scaling is None:
        return []
    kind, _, factor = scaling.partition(":")
    return [
        f"it was trained with rotary positions scaled by {scaling}, and is wrong without: llama.cpp: --rope-scaling "
        f"{kind} --rope-scale {factor}; vLLM: --hf-overrides with the base's rope_parameters; or merge it "
        "(lorakit merge writes them into config.json)"
    ]


def _check_names(path: Path, tokens: Iterable[str]) -> None:
    """Raise ConfigError if a token's own file would replace the adapter's."""
    same = next((name for name in tokens if name.lower() == path.name.lower()), None)
    if same is not None:
        raise ConfigError(
            f"{path.name} would be the adapter's file and that of its token, which is written beside it\n"
            f"  name another OUT, such as {path.with_name(f'{path.stem}-lora{path.suffix}')}"
        )


def _check_free(files: list[Path], force: bool) -> None:
    there = [file for file in files if file.exists()]
    if there and not force:
        raise ConfigError(f"{there[0]} exists\n  --force (force=True) replaces it; or name another folder")


def _unchecked(adapter: Adapter) -> str:
    """What is not known of an adapter while its base is not at hand."""
    some = next(iter(adapter.updates), next(iter(adapter.saved), "its modules"))
    return (
        f"without a base (--base) it was not checked that the model has the {len(adapter.updates)} modules by these "
        f"names ('{some}'...), in these shapes: a receiver passes over a module that it does not find"
    )


def _fixed(adapter: Adapter, receiver: str) -> tuple[Adapter, list[str]]:
    """Apply every available fix. Returns the adapter and a description of each fix."""
    fixes = []
    for _ in RECEIVERS[receiver].rules:  # one fix may resolve or reveal another finding; none occurs twice
        finding = next((f for f in findings(adapter, receiver) if f.fix is not None), None)
        if finding is None or finding.fix is None:
            break
        adapter = finding.fix(adapter)
        fixes.append(f"{finding.what}: {finding.way_out}")
    return adapter, fixes


def _refusal(receiver: str, refused: list[Finding]) -> str:
    def option(f: Finding) -> str:
        if f.fix is not None:
            return " (--fix does it)"
        return (
            " (--fix with --base FOLDER does it in a copy of the base)"
            if f.into_base and RECEIVERS[receiver].format != "gguf"
            else ""
        )

    lines = [f"{f.what}\n    {f.way_out}{option(f)}" for f in refused]
    if RECEIVERS[receiver].format == "gguf":
        lines.append("--merged --base FOLDER merges base and adapter into one GGUF model, for any adapter")
    return f"{receiver} does not accept this adapter:\n  " + "\n  ".join(lines)
