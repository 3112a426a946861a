"""`lorakit combine`: combine several adapters into one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from .shared.algebra import Alpha, Base, Dtype, Force, Json, Keep, Modules, Rank, To, progress, report, write
from .shared.files import base_folder, format_for, output_path, parse_weights, read
from .shared.names import check_names
from .shared.options import ModelType
from .shared.starting import starting

if TYPE_CHECKING:
    from ..adapter.algebra.combine import Method


def combine(
    adapters: Annotated[list[str], typer.Argument(help="the adapters (folders, files or hub ids)")],
    out: Annotated[Path, typer.Option(help="where to write the result")],
    weights: Annotated[str | None, typer.Option(help="one per adapter, e.g. 0.7,0.3; default: 1 each")] = None,
    method: Annotated[
        str, typer.Option(help="linear (exact), svd, ties, dare_linear, dare_ties or magnitude_prune")
    ] = "linear",
    rank: Rank = None,
    keep: Keep = None,
    density: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="share of each ΔW's elements that ties, dare and magnitude_prune keep"),
    ] = None,
    majority: Annotated[
        Literal["total", "frequency"], typer.Option(help="how ties elects signs: by sum or by count")
    ] = "total",
    seed: Annotated[int, typer.Option(help="seed for dare")] = 0,
    saved: Annotated[
        Literal["equal", "mean"], typer.Option(help="saved modules and embeddings must be equal, or are averaged")
    ] = "equal",
    alpha: Alpha = None,
    to: To = None,
    dtype: Dtype = None,
    base: Base = None,
    model_type: ModelType = None,
    force: Force = False,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="combine even if they were trained on different bases")
    ] = False,
    modules: Modules = False,
    json_output: Json = False,
) -> None:
    """Combine several adapters into one: the exact weighted sum of their updates, or TIES, DARE or pruning."""
    check_names(adapters=adapters)
    with starting("reading the adapters"):
        from ..adapter.algebra.combine import combined

        format = format_for(to, adapters[0], out)
        out = output_path(out, format, force)
        values = [read(source, alpha, base_folder(base), model_type=model_type) for source in adapters]
    started = time.monotonic()
    with progress("combining") as on_module:
        result = combined(
            values,
            parse_weights(weights),
            cast("Method", method),  # `combined` raises for an unknown one, with the nearest name
            rank=rank,
            keep=keep,
            density=density,
            majority=majority,
            seed=seed,
            saved=saved,
            force=force_base,
            on_module=on_module,
        )
    report(
        f"combined {len(adapters)} adapters ({method})",
        values,
        result,
        write(result.adapter, out, format, dtype, base, as_read=to is None),
        started,
        modules,
        json_output,
    )
