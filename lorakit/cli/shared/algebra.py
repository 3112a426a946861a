"""What `combine`, `resize` and `extract` share: options, a line of progress, and the report on the adapter that was written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .files import base_folder, dtype_of, inspect_call

if TYPE_CHECKING:
    from ...adapter.adapter import Adapter
    from ...adapter.algebra.resize import Resized

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


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A line on a terminal that says how far it is; the block tells it by (name, done, total)."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda name, done, total: status.update(f"{what} {done}/{total} {name}")


def report(
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
    print(f"{what}: {len(done.modules)} modules, {told_ranks}; {count[0]:,} parameters -> {count[1]:,}, {seconds_since(began)}")
    worst = done.worst
    if worst is not None and worst.error > 0:
        print(f"relative error {done.error:.3g} ({done.energy:.2%} of the energy kept); largest: {worst.module}, {worst.error:.3g}")
    else:
        print("exact")
    print(f"next: {look}")


def write(adapter: Adapter, out: Path, to: str, dtype: str | None, base: str | None) -> tuple[Path, str]:
    """What was written, and the call that looks at it."""
    from ...formats import save

    path = save(adapter, out, to, dtype=dtype_of(dtype), base=base_folder(base))
    return path, inspect_call(path, adapter, to, base)


def seconds_since(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"
