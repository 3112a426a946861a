"""`lorakit combine`, `resize`, `extract`: arithmetic on adapters as files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .files import base_folder, dtype_of, free, inspect_call, numbers, read
from .starting import starting

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter
    from ..adapter.algebra.resize import Resized

Out = Annotated[Path, typer.Argument(help="where to write the result")]
Rank = Annotated[int | None, typer.Option(min=1, help="the rank of the result, at most")]
Keep = Annotated[float | None, typer.Option(min=0, max=1, help="keep this share of the energy Σσ² of each module, e.g. 0.99")]
To = Annotated[str, typer.Option(help="format to write: peft, or any that `lorakit convert` writes")]
Alpha = Annotated[float | None, typer.Option(help="for loralib files, which do not hold it")]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="precision to write; default: as it comes")]
Base = Annotated[str | None, typer.Option(help="the base's folder, which GGUF needs (--to gguf, and to read one)")]
Force = Annotated[bool, typer.Option("--force", help="replace OUT if it exists")]
Modules = Annotated[bool, typer.Option("--modules", help="a line for each module")]
Json = Annotated[bool, typer.Option("--json", help="print the report as JSON")]


def combine(
    adapters: Annotated[list[str], typer.Argument(help="the adapters (folders, files or hub ids)")],
    out: Annotated[Path, typer.Option(help="where to write the result")],
    weights: Annotated[str | None, typer.Option(help="one for each, e.g. 0.7,0.3; default: 1 each")] = None,
    method: Annotated[str, typer.Option(help="linear (exact), svd, ties, dare_linear, dare_ties or magnitude_prune")] = "linear",
    rank: Rank = None,
    keep: Keep = None,
    density: Annotated[float | None, typer.Option(min=0, max=1, help="share of each ΔW that ties, dare and magnitude_prune leave")] = None,
    majority: Annotated[Literal["total", "frequency"], typer.Option(help="how ties elects a sign")] = "total",
    seed: Annotated[int, typer.Option(help="for dare")] = 0,
    saved: Annotated[Literal["equal", "mean"], typer.Option(help="weights held whole must be equal, or are averaged")] = "equal",
    alpha: Alpha = None,
    to: To = "peft",
    dtype: Dtype = None,
    base: Base = None,
    force: Force = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="combine although they were trained on different bases")] = False,
    modules: Modules = False,
    json_output: Json = False,
) -> None:
    """Several adapters as one: the exact weighted sum of what they add, or TIES, DARE and pruning of it."""
    with starting("reading the adapters"):
        from ..adapter.algebra.combine import combined

    out = free(out, to, force)
    values = [read(source, alpha, base_folder(base)) for source in adapters]
    began = time.monotonic()
    with _progress("combining") as tell:
        done = combined(
            values, numbers(weights), method, rank=rank, keep=keep, density=density, majority=majority, seed=seed, saved=saved,  # type: ignore[arg-type]
            force=force_base, on_module=tell,
        )  # fmt: skip
    _report(
        f"{len(adapters)} adapters as one ({method})", values, done, _write(done.adapter, out, to, dtype, base), began, modules, json_output
    )


def resize(
    adapter: Annotated[str, typer.Argument(help="the adapter (folder, file or hub id)")],
    out: Out,
    rank: Rank = None,
    keep: Keep = None,
    error: Annotated[float | None, typer.Option(min=0, max=1, help="the largest error ‖ΔW - ΔW'‖ / ‖ΔW‖ of each module")] = None,
    overall: Annotated[bool, typer.Option("--overall", help="--keep or --error of all modules together, by one threshold")] = False,
    drop_bias: Annotated[bool, typer.Option("--drop-bias", help="leave out changes of biases beside whole updates")] = False,
    alpha: Alpha = None,
    to: To = "peft",
    dtype: Dtype = None,
    base: Base = None,
    force: Force = False,
    modules: Modules = False,
    json_output: Json = False,
) -> None:
    """An adapter at a lower rank, with the smallest error that this rank allows; LoHa, LoKr and whole updates become LoRA."""
    with starting("reading the adapter"):
        from ..adapter.algebra.resize import resize as cut

    out = free(out, to, force)
    value = read(adapter, alpha, base_folder(base))
    began = time.monotonic()
    with _progress("resizing") as tell:
        done = cut(
            value, rank, keep=keep, error=error, overall=overall, drop_bias=drop_bias,
            on_module=tell,
        )  # fmt: skip
    _report("resized", [value], done, _write(done.adapter, out, to, dtype, base), began, modules, json_output)


def extract(
    base: Annotated[
        str, typer.Argument(help="the base: a checkpoint folder, a pipeline's, a diffusion model's .safetensors, or 'embedded'")
    ],
    tuned: Annotated[str, typer.Argument(help="the checkpoint that was fine-tuned from it")],
    out: Out,
    rank: Rank = None,
    keep: Annotated[float | None, typer.Option(min=0, max=1, help="hold this share of each weight's change, e.g. 0.95")] = None,
    target: Annotated[list[str] | None, typer.Option(help="only modules whose name ends so; may be repeated")] = None,
    save_rest: Annotated[
        bool,
        typer.Option("--save-rest", help="keep biases, norms and all else that changed whole (kohya: but biases of modules with factors)"),
    ] = False,
    seed: Annotated[int, typer.Option(help="of the random projections")] = 0,
    to: Annotated[str | None, typer.Option(help="format to write; default: peft, of a diffusion model kohya")] = None,
    dtype: Dtype = None,
    force: Force = False,
    modules: Modules = False,
    json_output: Json = False,
) -> None:
    """A LoRA out of a fine-tuned checkpoint and its base, one tensor in memory at a time."""
    with starting("reading the checkpoints"):
        from ..checkpoint.extract import extract as take
        from ..errors import listing

    before, after = base_folder(base), base_folder(tuned)
    assert before is not None
    assert after is not None
    image = before.is_file() or (before / "model_index.json").is_file()
    to = to or ("kohya" if image else "peft")
    out = free(out, to, force)
    began = time.monotonic()
    with _progress("extracting") as tell:
        done = take(
            before, after, rank, keep=keep, targets=target, save_rest=save_rest, seed=seed,
            on_tensor=tell,
        )  # fmt: skip
    path, look = _write(done.adapter, out, to, dtype, base)
    if json_output:
        print(json.dumps({"out": str(path), "parameters": done.adapter.parameters, **done.to_dict()}))
        return
    if modules:
        for m in done.modules:
            print(f"  {m.module}  {'x'.join(map(str, m.shape))}  changed {m.change:.3g}  rank {m.rank}  captured {m.captured:.1%}")
    print(f"{len(done.modules)} changed matrices, largest rank {done.adapter.rank}; {done.unchanged} tensors unchanged")
    if done.rest:
        left = [name for name in done.rest if name not in done.kept]
        told = f", {len(left)} left out ({listing(left, 3)})" if left else ""
        print(f"{len(done.rest)} other tensors changed: {len(done.kept)} kept whole{told}")
    print(f"captured: {done.captured:.2%} of the change (squared norm); {done.adapter.parameters:,} parameters, {_seconds(began)}")
    for doubt in done.warnings:
        print(f"note: {doubt}")
    again = look if image or to != "peft" else f"lorakit eval DATA --model {quote(base)} --adapter {quote(str(path))}"
    print(f"next: {again}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A line on a terminal that says how far it is; the block tells it by (name, done, total)."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda name, done, total: status.update(f"{what} {done}/{total} {name}")


def _report(
    what: str, before: list[Adapter], done: Resized, written: tuple[Path, str], began: float, modules: bool, json_output: bool
) -> None:
    path, look = written
    count = [sum(a.parameters for a in before), done.adapter.parameters]
    if json_output:
        told: dict[str, Any] = {"out": str(path), "rank": done.adapter.rank, "parameters": {"before": count[0], "after": count[1]}}
        print(json.dumps(told | done.to_dict()))
        return
    if modules:
        for m in done.modules:
            print(f"  {m.module}  rank {m.before} -> {m.after}  error {m.error:.3g}")
    ranks = sorted({f.rank for f in done.adapter.factors.values()})
    told_ranks = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "whole updates"
    print(f"{what}: {len(done.modules)} modules, {told_ranks}; {count[0]:,} parameters -> {count[1]:,}, {_seconds(began)}")
    worst = done.worst
    if worst is not None and worst.error > 0:
        print(f"relative error {done.error:.3g} ({done.energy:.2%} of the energy kept); largest: {worst.module}, {worst.error:.3g}")
    else:
        print("exact")
    print(f"next: {look}")


def _write(adapter: Adapter, out: Path, to: str, dtype: str | None, base: str | None) -> tuple[Path, str]:
    """What was written, and the call that looks at it."""
    from ..formats import save

    path = save(adapter, out, to, dtype=dtype_of(dtype), base=base_folder(base))
    return path, inspect_call(path, adapter, to, base)


def _seconds(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"
