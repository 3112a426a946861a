"""`merge_checkpoint`: a checkpoint folder and an adapter into a new checkpoint folder, without building the model.

OUT is written under a temporary name beside it, synced, read back, and only then renamed: there is the whole of it or
nothing. The base is only read.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import differences, fingerprint, places
from ..errors import AdapterError, LorakitError, listing
from ..formats.files import sync_folder, write_text
from ..formats.stream import MERGEABLE, NAMES
from ..version import VERSION
from .base import CONFIG, INDEX, Base, open_base
from .names import Renaming
from .plan import Plan, make_plan
from .report import MergeReport, TargetReport
from .tensors import in_order, read_back, write_file
from .ties import untied

NOTE = "lorakit_merge.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".npz"}
SLACK = 1 << 20  # for headers and what the file system adds


def merge_checkpoint(
    base: Path | str,
    adapter: Adapter | Path | str,
    out: Path | str,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
    untie: bool = False,
    force_base: bool = False,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> MergeReport:
    """Write BASE + ADAPTER as a plain checkpoint folder OUT. Memory: a few blocks of a tensor, and the adapter.

    dtype: the precision to write (the base's, by default). untie: give tied weights that the adapter changes a tensor each.
    force: replace an existing OUT. force_base: merge although the base is not the one the adapter was trained on.
    on_tensor(name, done, total): called after each tensor; each counts twice, written and read back.
    Raises LorakitError (TargetError, AdapterError) for whatever does not fit, and then leaves nothing behind.
    """
    began = time.monotonic()
    if dtype is not None and NAMES.get(dtype) not in MERGEABLE:
        raise LorakitError(f"dtype is {dtype}; expected torch.bfloat16, torch.float16, torch.float32 or torch.float64")
    folder, target = Path(base).expanduser(), Path(out).expanduser().resolve()
    source = None if isinstance(adapter, Adapter) else Path(adapter).expanduser()
    _check_out(folder.resolve(), source.resolve() if source is not None and source.exists() else None, target, force)
    opened = open_base(folder)
    value = (adapter if isinstance(adapter, Adapter) else Adapter.load(source or adapter)).check()
    plan = make_plan(opened, value, dtype, untie)
    config = untied(opened.config, folder) if plan.untied else dict(opened.config)
    if dtype is not None:
        config = _with_dtype({"dtype": "", **config} if "torch_dtype" not in config else config, str(dtype).removeprefix("torch."))
    warnings = _check_base(opened, value, plan.rename, force_base)
    copies, left_out = _other_files(opened)
    _check_space(target, sum(e.nbytes for e in plan.entries) + sum(p.stat().st_size for p in copies.values()))

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        for name, path in copies.items():
            _copy(path, temporary / name)
        if config != opened.config:
            write_text(temporary / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        with _one_thread():
            reports = _write_tensors(opened, plan, temporary, on_tensor)
        warnings += _lost(list(reports.values()), plan)
        if opened.index is not None:
            write_text(temporary / INDEX, json.dumps(_index(opened, plan), indent=2) + "\n")
        report = MergeReport(
            base=str(base), adapter=repr(adapter) if isinstance(adapter, Adapter) else str(adapter), out=str(out),
            dtype=str(dtype or opened.dtype).removeprefix("torch."), converted=dtype is not None and dtype != opened.dtype,
            targets=tuple(reports[m] for m in value.factors),
            replaced=tuple(plan.replaced), added=tuple(plan.added), untied=tuple(plan.untied),
            untouched=sum(e.copied and e.name in opened.tensors for e in plan.entries), tensors=len(plan.entries),
            bytes=sum(e.nbytes for e in plan.entries), left_out=tuple(left_out), warnings=tuple(warnings), seconds=time.monotonic() - began,
        )  # fmt: skip
        note = {"lorakit": VERSION, "base": report.base, "adapter": report.adapter, "merged": report.headline(), "warnings": warnings}
        write_text(temporary / NOTE, json.dumps(note, indent=2, ensure_ascii=False) + "\n")
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
    return report


def _check_out(base: Path, adapter: Path | None, out: Path, force: bool) -> None:
    for what, path in (("base", base), ("adapter", adapter)):
        if path is not None and (path == out or out in path.parents):
            raise LorakitError(
                f"OUT {out} {'is' if path == out else 'holds'} the {what} itself\n  give another folder: the {what} is only read"
            )
    if base in out.parents:
        raise LorakitError(f"OUT {out} is inside the base's folder\n  give a folder elsewhere: the base is only read")
    if not out.exists():
        return
    if not force:
        raise LorakitError(f"OUT {out} exists\n  give another folder, or replace it with force=True (--force)")
    here = Path.cwd()
    if out in (here, *here.parents, Path.home(), *Path.home().parents):
        raise LorakitError(f"OUT {out} is a folder that this program, or you, live in; force would delete it\n  give another folder")


def _check_base(base: Base, adapter: Adapter, rename: Renaming, force: bool) -> list[str]:
    """Compare a few numbers with those that the adapter's fingerprint holds of its base. Returns warnings."""
    expected = adapter.metadata.get("fingerprint")
    if not expected or force:
        return []
    if not isinstance(expected, Mapping) or not isinstance(expected.get("samples"), Mapping):
        raise AdapterError("the adapter's fingerprint of its base is damaged\n  merge without that check: force_base=True (--force-base)")
    samples, found = {}, {}
    for name, numbers in expected["samples"].items():
        slot = base.tensors.get(rename(name))
        replaced = name in adapter.saved  # a fresh head is not the base's
        if slot is not None and slot.nbytes and slot.torch_dtype is not None and not replaced:
            samples[name] = numbers
            # Where a fingerprint looks, and no more than that: of these few numbers it takes each.
            found[name] = slot.numbers(places(math.prod(slot.shape)))
    # The rest of the fingerprint speaks of a model, with heads and ties as its class has them; here only the numbers count.
    architecture = base.architecture or ""
    lines = differences({**fingerprint(found, architecture), "samples": samples}, found, architecture)
    if lines:
        raise AdapterError(
            "the adapter was trained on another base:\n  "
            + "\n  ".join(lines)
            + "\n  give that base, or force_base=True (--force-base) if you know better"
        )
    trained = expected.get("architecture")
    if trained and architecture and trained != architecture:
        return [f"the adapter was trained on a {trained}, the base is saved as a {architecture}: load the result as a {trained}"]
    return []


def _other_files(base: Base) -> tuple[dict[str, Path], list[str]]:
    """({name within the folder: path} to copy, names left out): all but weights, adapters and what hides behind a dot."""
    copies: dict[str, Path] = {}
    left_out = []
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or str(name) in (NOTE, INDEX, *base.shards):
            continue
        folders = [base.folder.joinpath(*name.parts[:i]) for i in range(1, len(name.parts))]
        if _is_weights(path) or any(_is_model(f) for f in folders) or name.name in ("adapter_config.json", "lorakit.json"):
            left_out.append(str(name))
        else:
            copies[str(name)] = path
    return copies, left_out


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS or path.name.endswith((".bin.index.json", ".safetensors.index.json"))


def _is_model(folder: Path) -> bool:
    """Whether a folder within the base's holds a model or an adapter of its own."""
    names = {p.name for p in folder.iterdir()}
    return folder.name == "original" or "adapter_config.json" in names or (CONFIG in names and any(_is_weights(folder / n) for n in names))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config with its precision changed, and that of the configs within it."""
    inner = {key: _with_dtype(value, dtype) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return {**config, **inner, **{key: dtype for key in ("dtype", "torch_dtype") if key in config}}


def _check_space(out: Path, need: int) -> None:
    there = next(p for p in out.parents if p.exists())
    free = shutil.disk_usage(there).free
    if free < need + SLACK:
        stale = sorted(p.name for p in there.glob(f".{out.name}.tmp-*"))
        hint = f"\n  left over from runs that were killed, and yours to delete: {listing(stale)}" if stale else ""
        raise LorakitError(f"{there} has {free / 1e9:,.2f} GB free; the merged checkpoint takes {need / 1e9:,.2f} GB{hint}")


def _write_tensors(base: Base, plan: Plan, folder: Path, on_tensor: Callable[[str, int, int], None] | None) -> dict[str, TargetReport]:
    total, count = 2 * len(plan.entries), 0

    def done(name: str) -> None:
        nonlocal count
        count += 1
        if on_tensor is not None:
            on_tensor(name, count, total)

    ordered = {file: in_order(entries) for file, entries in plan.files.items()}
    asked = {}
    for file, entries in ordered.items():
        asked[file] = write_file(folder / file, entries, {"format": "pt", **base.shards[file]}, done)
    return {r.module: r for file, entries in ordered.items() for r in read_back(folder / file, entries, asked[file], done)}


@contextmanager
def _one_thread():
    """Reading, adding and writing small blocks waits for memory and disk, not for arithmetic: threads only wait for each other.

    0.47 GB on two busy cores took 2.5 s with one thread and 24 s with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _index(base: Base, plan: Plan) -> dict[str, Any]:
    assert base.index is not None
    metadata = dict(base.index.get("metadata") or {})
    metadata["total_size"] = sum(e.nbytes for e in plan.entries)
    if "total_parameters" in metadata:
        extra = [e for e in plan.entries if e.name not in base.tensors]
        metadata["total_parameters"] += sum(torch.Size(e.shape).numel() for e in extra)
    return {"metadata": metadata, "weight_map": {e.name: e.file for e in sorted(plan.entries, key=lambda e: e.name)}}


def _lost(reports: list[TargetReport], plan: Plan) -> list[str]:
    """Warnings for updates below the precision. LorakitError if that is all of them: OUT would be the base."""
    lost = [r for r in reports if r.lost]
    if lost and len(lost) == sum(r.asked > 0 for r in reports) and not plan.replaced and not plan.added:
        raise LorakitError(
            f"no weight changed: the largest |ΔW|, {max(r.asked for r in lost):.3g}, is below the precision of the base's weights\n"
            "  write more digits: dtype=torch.float32; or keep the adapter unmerged"
        )
    return [f"'{r.module}' did not change: its largest |ΔW|, {r.asked:.3g}, is below its weight's precision" for r in lost]


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
    with open(to, "rb+") as file:
        os.fsync(file.fileno())


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename into place. What was there is moved aside first and deleted last."""
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        sync_folder(folder)
    old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}") if out.exists() else None
    if old is not None:
        os.rename(out, old)
    try:
        os.rename(temporary, out)
    except BaseException:
        if old is not None:
            os.rename(old, out)
        raise
    sync_folder(out.parent)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
