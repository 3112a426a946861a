"""`lorakit resize`: lower an adapter's rank."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .shared.algebra import Alpha, Base, Dtype, Force, Json, Keep, Modules, Out, Rank, To, progress, report, write
from .shared.files import base_folder, format_for, output_path, read
from .shared.names import check_names
from .shared.options import ModelType
from .shared.starting import starting


def resize(
    adapter: Annotated[str, typer.Argument(help="the adapter (folder, file or hub id)")],
    out: Out,
    rank: Rank = None,
    keep: Keep = None,
    error: Annotated[
        float | None, typer.Option(min=0, max=1, help="the largest error ‖ΔW - ΔW'‖ / ‖ΔW‖ allowed per module")
    ] = None,
    overall: Annotated[
        bool, typer.Option("--overall", help="apply --keep or --error to all modules together, with one threshold")
    ] = False,
    drop_bias: Annotated[bool, typer.Option("--drop-bias", help="drop the bias changes of dense updates")] = False,
    alpha: Alpha = None,
    to: To = None,
    dtype: Dtype = None,
    base: Base = None,
    model_type: ModelType = None,
    force: Force = False,
    modules: Modules = False,
    json_output: Json = False,
) -> None:
    """Lower an adapter's rank with the smallest possible error; LoHa, LoKr and dense updates become LoRA."""
    check_names(adapters=[adapter])
    with starting("reading the adapter"):
        from ..adapter.algebra.resize import resize as resize_adapter

        format = format_for(to, adapter, out)
        out = output_path(out, format, force)
        value = read(adapter, alpha, base_folder(base), model_type=model_type)
    started = time.monotonic()
    with progress("resizing") as on_module:
        result = resize_adapter(
            value, rank, keep=keep, error=error, overall=overall, drop_bias=drop_bias, on_module=on_module
        )
    written = write(result.adapter, out, format, dtype, base, as_read=to is None)
    report("resized", [value], result, written, started, modules, json_output)
