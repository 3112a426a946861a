"""`lorakit combine`: several adapters as one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from .shared.algebra import Alpha, Base, Dtype, Force, Json, Keep, Modules, Rank, To, progress, report, write
from .shared.files import base_folder, free, numbers, read
from .shared.starting import starting


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
    with progress("combining") as tell:
        done = combined(
            values, numbers(weights), method, rank=rank, keep=keep, density=density, majority=majority, seed=seed, saved=saved,  # type: ignore[arg-type]
            force=force_base, on_module=tell,
        )  # fmt: skip
    report(
        f"{len(adapters)} adapters as one ({method})", values, done, write(done.adapter, out, to, dtype, base), began, modules, json_output
    )
