"""`lorakit resize`: an adapter at a lower rank."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .shared.algebra import Alpha, Base, Dtype, Force, Json, Keep, Modules, Out, Rank, To, progress, report, write
from .shared.files import base_folder, free, read
from .shared.starting import starting


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
    with progress("resizing") as tell:
        done = cut(
            value, rank, keep=keep, error=error, overall=overall, drop_bias=drop_bias,
            on_module=tell,
        )  # fmt: skip
    report("resized", [value], done, write(done.adapter, out, to, dtype, base), began, modules, json_output)
