"""`merge_checkpoint`: merge adapters into a checkpoint on disk, block by block, without building the model.

OUT is written under a temporary name beside it, synced, read back, and only then renamed, so it is complete or absent.
The base is never written to.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import ONLY_ON, needs_quantized
from ..errors import AdapterError, ConfigError, LorakitError
from ..formats import find
from ..io.atomic import write_text
from ..io.staging import resolved, staged
from ..io.stream import MERGEABLE, NAMES
from ..version import VERSION
from .base import CONFIG, Base
from .changes import check_mergeable
from .conversation import keep_conversation
from .merge_plan import Plan, make_plan
from .merge_report import Difference, MergeReport, TargetReport
from .onto import check_pairs, differences, open_pairs
from .out import NOTE, check_out, check_space, copy, other_files, without_settings
from .parts import Part
from .renaming import Renaming
from .requantize import Requantize, check_kept, not_quantized, requantized_as
from .residual import load_on, started_as
from .same_base import compare_with_files
from .tied_weights import untied
from .vocabulary import keep_tokens, with_vocabulary
from .write import Reports, in_order, read_back, write_file

Source = Adapter | Path | str
Progress = Callable[[str, int, int], None]


def merge_checkpoint(
    base: Path | str,
    adapter: Source | Sequence[Source],
    out: Path | str,
    *,
    weights: Sequence[float] | None = None,
    alpha: float | None = None,
    force: bool = False,
    dtype: torch.dtype | None = None,
    untie: bool = False,
    force_base: bool = False,
    model_type: str | None = None,
    onto: Path | str | None = None,
    requantize: str | None = None,
    keep_at_least: float = 0.5,
    on_tensor: Progress | None = None,
) -> MergeReport:
    """Write BASE + Σ weight · ADAPTER as a plain checkpoint OUT. Memory: a few blocks of a tensor, and the adapters; of
    a quantized base the packed tensors of one module too.

    base: a transformers folder, a diffusers pipeline, or a diffusion model's single .safetensors file; OUT is of the
    same kind. Quantized weights (bitsandbytes, GPTQ, AWQ) become ordinary ones.
    adapter: one or several, of any kind: LoRA, LoHa, LoKr, dense ΔW, DoRA. weights: one for each; default 1.
    alpha: for adapter files that do not hold it (loralib, old MLX).
    dtype: the precision to write; default the base's, for quantized weights its 16-bit one, else bfloat16.
    untie: give tied weights that the adapter changes separate tensors.
    force: replace an existing OUT. force_base: merge even if the adapter was trained on another base.
    model_type: which diffusion model an adapter's file is for, where it does not tell (`formats.load`).
    onto: the unquantized folder of a quantized base: the adapter is merged into that, after a check that it is the same
    base, and the report has what differs.
    requantize: quantize the base's quantized weights again, "same" as they are or as "nf4", "fp4", "int8", "gptq",
    "awq", rounded to nearest; with `onto`, changed weights are computed from the unquantized ones.
    keep_at_least: the share of ΔW that each requantized weight must keep (`requantize`); 0 accepts any loss.
    on_tensor(name, done, total): called after each tensor, once when it is written and once when it is read back.

    Raises ConfigError for wrong settings, LorakitError (TargetError, AdapterError) for adapters that do not fit the
    base, and if requantizing would lose too much of one; nothing is left behind then.
    """
    began = time.monotonic()
    _check_settings(dtype, requantize, keep_at_least)
    given, target = Path(base).expanduser(), resolved(out)
    original = None if onto is None else Path(onto).expanduser()
    path = given if original is None or requantize is not None else original  # whose files OUT has
    inputs = [given] if original is None else [given, original]
    sources = [adapter] if isinstance(adapter, Adapter | Path | str) else list(adapter)
    factors = _weights(weights, len(sources))
    for each in inputs:
        check_out(resolved(each), _read_only(sources), target, force)
    values, warnings = _values(sources, factors, inputs[-1], alpha, force_base, model_type)
    plans: list[tuple[Part, Plan]] = []
    apart: list[Difference] = []
    names = [n for a in values for n in (*a.updates, *a.saved)]
    pairs = open_pairs(given, original, names, everything=dtype is not None)
    if not force_base:
        check_pairs(pairs)
    for quantized, unquantized in pairs:
        part = unquantized if unquantized is not None and requantize is None else quantized
        how = None if requantize is None else _requantize(requantize, quantized, unquantized)
        own = [(w, mine) for w, a in zip(factors, values, strict=True) if (mine := part.own(a)) is not None]
        plans.append((part, make_plan(part.base, own, dtype, untie, how)))
        for (_, mine), rename in zip(own, plans[-1][1].renames, strict=True):
            warnings += [] if force_base else check_base((unquantized or part).base, mine, rename)
        if unquantized is not None:
            apart += differences(quantized, unquantized.base, plans[-1][1].entries, force_base)
    if requantize is not None and all(plan.requantize is None for _, plan in plans):
        raise not_quantized(path)
    copies, left_out = other_files(path, [part for part, _ in plans]) if path.is_dir() else ({}, [])
    copies, stale = without_settings(copies, any(_new_quantization(part, plan) is not None for part, plan in plans))
    warnings += stale
    size = sum(e.nbytes for _, plan in plans for e in plan.entries)
    # Notes in the checkpoint must not reveal the user's folders. They have no times: equal merges write equal files.
    short = _description([s if isinstance(s, Adapter) else Path(s).name for s in sources], factors)
    note = {"lorakit": VERSION, "base": resolved(path).name, "adapter": short}
    with staged(target, fresh=True) as temporary:
        for each in inputs:  # another merge may have written it meanwhile
            check_out(resolved(each), _read_only(sources), target, force)
        check_space(temporary, size + sum(p.stat().st_size for p in copies.values()))
        folder = temporary.parent if path.is_file() else temporary
        folder.mkdir(exist_ok=True)
        for name, file in copies.items():
            copy(file, folder / name)
        warnings += keep_conversation(folder, values)
        keep_tokens(folder, values)
        with _one_thread():
            reports = _write_tensors(plans, folder, dtype is not None, note if path.is_file() else {}, on_tensor)
        check_kept(reports.requantized, keep_at_least, original is not None)
        warnings += _check_changed(reports.targets, plans)
        for part, plan in plans:
            _write_config(part, plan, folder / part.name, dtype)
        first = next((part.base for part, plan in plans if any(e.updates for e in plan.entries)), plans[0][0].base)
        report = MergeReport(
            base=str(base),
            adapter=_description(sources, factors),
            out=str(out),
            dtype=_dtype_name(first, dtype, plans),
            converted=dtype is not None and dtype != first.dtype,
            targets=tuple(reports.targets),
            replaced=_all(plans, "replaced"),
            added=_all(plans, "added"),
            untied=_all(plans, "untied"),
            untouched=sum(e.untouched and e.name not in p.split for _, p in plans for e in p.entries),
            tensors=sum(len(e.layout) for _, p in plans for e in p.entries),
            bytes=size,
            left_out=tuple(left_out),
            warnings=tuple(warnings),
            seconds=time.monotonic() - began,
            dequantized=sum(len(p.dequantized) for _, p in plans),
            requantized=tuple(reports.requantized),
            differences=tuple(apart),
        )
        if path.is_file():
            os.rename(folder / path.name, temporary)
        else:
            merged = {**note, "merged": report.outcome(), "warnings": warnings}
            write_text(folder / NOTE, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    return report


def _check_settings(dtype: torch.dtype | None, requantize: str | None, keep_at_least: float) -> None:
    """Raise LorakitError for settings that cannot be followed."""
    if dtype is not None and NAMES.get(dtype) not in MERGEABLE:
        raise LorakitError(f"dtype is {dtype}; expected torch.bfloat16, torch.float16, torch.float32 or torch.float64")
    if requantize is not None and dtype is not None:
        raise ConfigError(
            f"requantize is {requantize!r} and dtype {str(dtype).removeprefix('torch.')}: weights are quantized again, "
            "or written in another precision\n  give one of them"
        )
    if not (math.isfinite(keep_at_least) and 0 <= keep_at_least <= 1):
        raise ConfigError(f"keep_at_least is {keep_at_least:g}; expected a share of ΔW, from 0 to 1")


def _requantize(kind: str, part: Part, original: Part | None) -> Requantize | None:
    return requantized_as(kind, part.base, None if original is None else original.base.tensors)


def _new_quantization(part: Part, plan: Plan) -> Mapping[str, Any] | None:
    """Return the `quantization_config` that OUT gets instead of the base's, empty for none; None if it keeps that."""
    if part.base.quantization is None:
        return None
    return {} if plan.requantize is None else plan.requantize.config


def _dtype_name(base: Base, dtype: torch.dtype | None, plans: Sequence[tuple[Part, Plan]]) -> str:
    """Return what most weights were written as."""
    kind = next((plan.requantize.kind for _, plan in plans if plan.requantize is not None), None)
    own = base.dtype if base.quantization is None else base.dequantized_dtype
    return kind or str(dtype or own).removeprefix("torch.")


def _read_only(sources: Sequence[Source]) -> list[Path]:
    """Return the adapters' paths: as given, and of the adapter found inside (a run's folder, and its adapter/)."""
    named = [Path(s).expanduser() for s in sources if not isinstance(s, Adapter)]
    found = [find(s) for s in sources if not isinstance(s, Adapter)]
    return [resolved(p) for p in (*named, *found) if p.exists()]


def _values(
    sources: Sequence[Source],
    weights: Sequence[float],
    base: Path,
    alpha: float | None,
    force_base: bool,
    model_type: str | None,
) -> tuple[list[Adapter], list[str]]:
    """Read the adapters. Returns them and warnings."""
    values, warnings = [], []
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True), start=1):
        where = "" if isinstance(source, Adapter) else f" ({Path(source).name})"
        called = f"adapter {number}{where}" if len(sources) > 1 else "the adapter"
        start = None if isinstance(source, Adapter) else started_as(source)
        value = source if isinstance(source, Adapter) else load_on(source, base, alpha, force_base, model_type)
        values.append(value.check())
        warnings += check_mergeable(weight, value, called)
        if start:
            warnings.append(
                f"{Path(str(source)).name} was initialized as {start}: converted to a plain LoRA of twice the rank"
            )
    return values, warnings


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    found = [1.0] * count if weights is None else [float(w) for w in weights]
    if not count:
        raise ConfigError("there is no adapter to merge")
    if len(found) != count:
        raise ConfigError(f"{len(found)} weights for {count} adapters; expected one each")
    if not all(math.isfinite(w) for w in found):
        raise ConfigError(f"the weights are {found}; expected finite numbers")
    return found


def _description(sources: Sequence[Source], weights: Sequence[float]) -> str:
    return ", ".join(f"{'' if w == 1 else f'{w:g} x '}{s!s}" for s, w in zip(sources, weights, strict=True))


def check_base(base: Base, adapter: Adapter, rename: Renaming) -> list[str]:
    """Raise AdapterError if the adapter's fingerprint is of another base. Returns warnings."""
    quantization = adapter.metadata.get(ONLY_ON)
    if quantization and not base.config.get("quantization_config"):
        raise AdapterError(
            f"{needs_quantized(quantization)}: {base.folder} is not quantized\n"
            "  give the quantized base, or force_base=True (--force-base) if you know better"
        )
    lines = compare_with_files(base, adapter, rename)
    if lines:
        raise AdapterError(
            "the adapter was trained on another base:\n  "
            + "\n  ".join(lines)
            + "\n  give that base, or force_base=True (--force-base) if you know better"
        )
    known = adapter.metadata.get("fingerprint")
    trained = known.get("architecture") if isinstance(known, Mapping) else None
    if trained and base.architecture and trained != base.architecture:
        return [
            f"the adapter was trained on a {trained}, the base is saved as a {base.architecture}: load the result as a "
            f"{trained}"
        ]
    return []


def _write_tensors(
    plans: Sequence[tuple[Part, Plan]],
    folder: Path,
    converted: bool,
    note: Mapping[str, str],
    on_tensor: Progress | None,
) -> Reports:
    """Write every file and read it back. `note`: metadata for the files' headers."""
    total, count = 2 * sum(len(plan.entries) for _, plan in plans), 0

    def done(name: str) -> None:
        nonlocal count
        count += 1
        if on_tensor is not None:
            on_tensor(name, count, total)

    reports = Reports([], [])
    for part, plan in plans:
        (folder / part.name).mkdir(exist_ok=True)
        ordered = {file: in_order(entries) for file, entries in plan.files.items()}
        asked = {}
        for file, entries in ordered.items():
            # those are of the base's numbers
            header = {key: value for key, value in part.base.shards[file].items() if "hash" not in key}
            metadata = {"format": "pt", **header, **({"lorakit_merge": json.dumps(note)} if note else {})}
            asked[file] = write_file(folder / part.name / part.file(file, converted), entries, metadata, done)
        for file, entries in ordered.items():
            found = read_back(folder / part.name / part.file(file, converted), entries, asked[file], done)
            reports.targets.extend(r.within(part.name) for r in found.targets)
            reports.requantized.extend(r.within(part.name) for r in found.requantized)
    return reports


def _write_config(part: Part, plan: Plan, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a part's config and index if they changed."""
    base = part.base
    config = untied(base.config, base.folder) if plan.untied else dict(base.config)
    if plan.grown is not None:
        config = with_vocabulary(config, *plan.grown)
    quantization = _new_quantization(part, plan)
    if quantization is not None:
        config = _with_quantization(config, quantization)
    if dtype is not None and config:
        # A pipeline's component may leave out its dtype, a transformers model never does.
        has_dtype = part.name or "torch_dtype" in config
        config = _with_dtype(config if has_dtype else {"dtype": "", **config}, str(dtype).removeprefix("torch."))
    if config != base.config:
        write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if base.index is not None:
        index = _index(base, plan, {e.file: part.file(e.file, dtype is not None) for e in plan.entries})
        write_text(folder / part.file(base.index_name, dtype is not None), json.dumps(index, indent=2) + "\n")


def _with_quantization(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with another `quantization_config`, none if that is empty; also where a nested config has it."""
    made = {k: v for k, v in config.items() if k != "quantization_config"}
    text = made.get("text_config")
    if isinstance(text, dict):
        made["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return {**made, "quantization_config": dict(quantization)} if quantization else made


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config with its dtype changed, and the dtype of nested configs."""
    inner = {
        key: _with_dtype(value, dtype)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict)
    }
    return {**config, **inner, **{key: dtype for key in ("dtype", "torch_dtype") if key in config}}


@contextmanager
def _one_thread():
    """Use one thread: small blocks are bound by memory and disk, and threads only wait for each other.

    0.47 GB on two busy cores took 2.5 s with one thread and 24 s with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _index(base: Base, plan: Plan, files: Mapping[str, str]) -> dict[str, Any]:
    assert base.index is not None
    metadata = dict(base.index.get("metadata") or {})
    metadata["total_size"] = sum(e.nbytes for e in plan.entries)
    if "total_parameters" in metadata and plan.dequantized:
        metadata["total_parameters"] = sum(math.prod(e.shape) for e in plan.entries)
    elif "total_parameters" in metadata:
        extra = [e for e in plan.entries if e.name not in base.tensors]
        metadata["total_parameters"] += sum(torch.Size(e.shape).numel() for e in extra)
    return {
        "metadata": metadata,
        "weight_map": dict(sorted((name, files[e.file]) for e in plan.entries for name in e.layout)),
    }


def _all(plans: Sequence[tuple[Part, Plan]], what: str) -> tuple[str, ...]:
    return tuple(part.called(name) for part, plan in plans for name in getattr(plan, what))


def _check_changed(reports: Sequence[TargetReport], plans: Sequence[tuple[Part, Plan]]) -> list[str]:
    """Return warnings for updates below the weights' precision. Raises LorakitError if no weight changed at all."""
    vanished = [r for r in reports if r.below_precision]
    if not any(r.changed for r in reports) and not any(p.replaced or p.added for _, p in plans):
        if not vanished:
            raise LorakitError(
                "no weight changed: the adapters cancel each other, or change nothing\n  there is nothing to merge"
            )
        largest = max(r.asked for r in vanished)
        if any(plan.requantize is not None for _, plan in plans):
            raise LorakitError(
                f"no weight changed: rounding undoes all of the adapter, whose largest |ΔW| is {largest:.3g}\n"
                "  merge without requantize (--requantize), or onto the unquantized base (--onto)"
            )
        raise LorakitError(
            f"no weight changed: the largest |ΔW|, {largest:.3g}, is below the precision of "
            "the base's weights\n"
            "  write more digits: dtype=torch.float32 (--dtype fp32); or keep the adapter unmerged"
        )
    return [
        f"'{r.module}' did not change: its largest |ΔW|, {r.asked:.3g}, is below its weight's precision"
        for r in vanished
    ]
