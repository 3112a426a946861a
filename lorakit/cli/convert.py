"""`lorakit convert`: an adapter in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .shared.files import base_folder, dtype_of, free, inspect_call, read
from .shared.options import Force
from .shared.starting import starting

_KINDS = Annotated[
    Literal["bf16", "fp16", "fp32", "q8_0"] | None, typer.Option(help="precision of the numbers (q8_0: gguf only); default: the adapter's")
]
_BASE = Annotated[str | None, typer.Option(help="the base's folder (its config.json), which llama.cpp's format needs")]


def convert(
    source: Annotated[str, typer.Argument(help="an adapter in any format: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="what to write: a folder for peft and mlx, a file for the others")],
    to: Annotated[Literal["peft", "loralib", "kohya", "diffusers", "cloneofsimo", "mlx", "gguf"], typer.Option(help="the format to write")],
    base: _BASE = None,
    alpha: Annotated[float | None, typer.Option(help="for files that do not hold it (loralib, old MLX)")] = None,
    dtype: _KINDS = None,
    allow_loss: Annotated[bool, typer.Option("--allow-loss", help="leave out what the format cannot hold, and list it")] = False,
    force: Force = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Write an adapter in another format. What that cannot hold is an error, unless it may be lost; then it is listed."""
    with starting(f"reading {source}"):
        from ..formats import format_of
        from ..formats.convert import convert as converted

    out, folder, was = free(out, to, force), base_folder(base), format_of(source)
    done = converted(
        read(source, alpha, folder), out, to, base=folder, dtype="q8_0" if dtype == "q8_0" else dtype_of(dtype), allow_loss=allow_loss
    )
    if json_output:
        print(json.dumps({"from": was, **done.to_dict()}))
        return
    for loss in done.lost:
        print(f"left out: {loss}")
    print(f"{source} ({was}) -> {done.path} ({to}): {len(done.adapter.updates)} modules, {done.adapter.parameters:,} parameters")
    if to == "loralib":
        print("the file holds no alpha: it is to be read with the one below")
    if to == "kohya" and len({f.alpha for f in done.adapter.factors.values()}) > 1:
        print("note: diffusers mistakes alphas that differ from module to module in this format; for it: lorakit export --for diffusers")
    print(f"next: {inspect_call(done.path, done.adapter, to, base)}")
