"""`lorakit convert`: convert an adapter to another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .shared.files import base_folder, dtype_of, inspect_call, output_path, read
from .shared.names import check_names
from .shared.options import Force, ModelType
from .shared.output import say
from .shared.starting import starting

_KINDS = Annotated[
    Literal["bf16", "fp16", "fp32", "q8_0"] | None,
    typer.Option(help="precision of the tensors (q8_0: gguf only); default: the adapter's"),
]
_BASE = Annotated[str | None, typer.Option(help="the base's folder (with config.json), required for gguf")]


def convert(
    source: Annotated[str, typer.Argument(help="an adapter in any format: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="the output: a folder for peft and mlx, a file for the others")],
    to: Annotated[
        Literal["peft", "loralib", "kohya", "diffusers", "comfyui", "cloneofsimo", "mlx", "gguf"],
        typer.Option(help="the format to write"),
    ],
    base: _BASE = None,
    alpha: Annotated[float | None, typer.Option(help="for files that do not store it (loralib, old MLX)")] = None,
    dtype: _KINDS = None,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="leave out what the format cannot hold, and list it")
    ] = False,
    keep_alpha: Annotated[
        bool,
        typer.Option("--keep-alpha", help="kohya, diffusers: write alphas as they are, instead of folded into factors"),
    ] = False,
    model_type: ModelType = None,
    force: Force = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Convert an adapter to another format.

    What that format cannot hold is an error; --allow-loss leaves it out and lists it.
    """
    check_names(adapters=[source])
    with starting(f"reading {source}"):
        from ..formats import format_of
        from ..formats.convert import convert as converted

        out, folder, source_format = output_path(out, to, force), base_folder(base), format_of(source)
        result = converted(
            read(source, alpha, folder, model_type=model_type),
            out,
            to,
            base=folder,
            dtype="q8_0" if dtype == "q8_0" else dtype_of(dtype),
            allow_loss=allow_loss,
            keep_alpha=keep_alpha,
        )
    if json_output:
        print(json.dumps({"from": source_format, **result.to_dict()}))
        return
    for loss in result.lost:
        say(f"left out: {loss}")
    size = f"{len(result.adapter.updates)} modules, {result.adapter.parameters:,} parameters"
    say(f"{source} ({source_format}) -> {result.path} ({to}): {size}")
    if to == "loralib":
        say("the file does not store alpha: pass it when reading, as below")
    if keep_alpha and to == "kohya" and len({f.alpha for f in result.adapter.factors.values()}) > 1:
        say("note: diffusers misreads alphas that differ by module in this format")
    print(f"next: {inspect_call(result.path, result.adapter, to, base)}")
