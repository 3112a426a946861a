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

import torch

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import ONLY_ON, needs_quantized
from ..errors import AdapterError, ConfigError, LorakitError
from ..formats import find
from ..io.atomic import write_text
from ..io.staging import resolved, staged
from ..io.stream import MERGEABLE, NAMES
from ..version import VERSION
from .base import Base
from .changes import check_mergeable
from .conversation import keep_conversation
from .long_context import with_scaling
from .merge_plan import Plan, make_plan
from .merge_report import Difference, MergeReport, TargetReport
from .onto import check_pairs, differences, open_pairs
from .out import NOTE, check_out, check_space, copy, other_files, without_settings
from .out_config import new_quantization, write_config
from .parts import Part
from .renaming import Renaming
from .requantize import check_kept, not_quantized, ordinary_note, requantized_as
from .residual import load_on, started_as
from .same_base import compare_with_files, quantized_otherwise
from .vocabulary import keep_tokens
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
    for module, update in ((m, u) for a in values for m, u in a.updates.items()):
        if (why := update.unmergeable()) is not None:
            raise AdapterError(f"'{module}' {why}")
    names = [n for a in values for n in (*a.updates, *a.saved)]
    pairs = open_pairs(given, original, names, everything=dtype is not None)
    if not force_base:
        check_pairs(pairs)
    plans = [_plan(pair, values, factors, dtype, untie, requantize) for pair in pairs]
    for part, _ in plans:
        with_scaling(part.base.config, part.base.folder, values)  # its errors, before anything is written
    if requantize is not None and all(plan.requantize is None for _, plan in plans):
        raise not_quantized(path)
    apart: list[Difference] = []
    for (quantized, unquantized), (part, plan) in zip(pairs, plans, strict=True):
        if not force_base:
            warnings += _check_bases(unquantized or part, values, plan)
        if unquantized is not None:
            apart += differences(quantized, unquantized.base, plan.entries, force_base)
    copies, left_out = other_files(path, [part for part, _ in plans]) if path.is_dir() else ({}, [])
    copies, stale = without_settings(copies, any(new_quantization(part, plan) is not None for part, plan in plans))
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
        warnings += [line for _, plan in plans for line in ordinary_note(plan.requantize)]
        for part, plan in plans:
            write_config(part, plan, folder / part.name, dtype, values)
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


def _plan(
    pair: tuple[Part, Part | None],
    values: Sequence[Adapter],
    factors: Sequence[float],
    dtype: torch.dtype | None,
    untie: bool,
    requantize: str | None,
) -> tuple[Part, Plan]:
    """Return the part that OUT is made from, and its plan. `pair`: a part, and the same before it was quantized."""
    quantized, unquantized = pair
    part = unquantized if unquantized is not None and requantize is None else quantized
    weights = None if unquantized is None else unquantized.base.tensors
    how = None if requantize is None else requantized_as(requantize, quantized.base, weights)
    own = [(w, mine) for w, a in zip(factors, values, strict=True) if (mine := part.own(a)) is not None]
    return part, make_plan(part.base, own, dtype, untie, how)


def _check_bases(part: Part, values: Sequence[Adapter], plan: Plan) -> list[str]:
    """Raise AdapterError if an adapter was trained on another base than this part. Returns warnings."""
    own = [mine for a in values if (mine := part.own(a)) is not None]
    return [w for mine, rename in zip(own, plan.renames, strict=True) for w in check_base(part.base, mine, rename)]


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
    otherwise = quantized_otherwise(base, adapter, rename)
    if otherwise is not None:
        raise AdapterError(
            f"{needs_quantized(adapter.metadata[ONLY_ON])}: {base.folder} is {otherwise}\n"
            "  give the base quantized in that way, without onto (--onto); or force_base=True (--force-base) if you "
            "know better"
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
