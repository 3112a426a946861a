"""`lorakit edit`: scale, negate, prune or rename an adapter."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from .shared.files import base_folder, dtype_of, inspect_call, output_path, read
from .shared.names import check_names
from .shared.options import ModelType
from .shared.output import say
from .shared.starting import starting


def edit(
    source: Annotated[str, typer.Argument(help="the adapter: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="the output: a folder or file")],
    scale: Annotated[
        float | None, typer.Option(help="multiply every ΔW by this; -1 gives the adapter that undoes it")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="keep only modules with this name ending; repeatable")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="leave out modules with this name ending; repeatable")] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="replace this prefix of module names; repeatable")
    ] = None,
    to: Annotated[str | None, typer.Option(help="format to write; default: the same, in its own spelling")] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="precision of the tensors; default: the same")
    ] = None,
    base: Annotated[str | None, typer.Option(help="the base's folder, required for GGUF")] = None,
    alpha: Annotated[float | None, typer.Option(help="for files that do not store it (loralib, old MLX)")] = None,
    model_type: ModelType = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Scale, negate, prune or rename an adapter, or change its precision; in the order only, drop, rename, scale."""
    if scale is None and not (only or drop or rename or dtype):
        raise ConfigError(
            "edit has nothing to change\n  give --scale, --only, --drop, --rename or --dtype; or use lorakit convert"
        )
    if scale == 0:
        raise ConfigError("--scale 0 would leave nothing of the adapter\n  give a scale other than 0")
    check_names(adapters=[source])
    with starting(f"reading {source}"):
        from ..adapter.algebra import edit as edits
        from ..formats import format_of, save, save_as_read

        started = time.monotonic()
        format, folder = to or format_of(source), base_folder(base)
        out = output_path(out, format, force)
        adapter = before = read(source, alpha, folder, model_type=model_type)
        if only:
            adapter = edits.select(adapter, only)
        if drop:
            adapter = edits.prune(adapter, drop)
        if rename:
            adapter = edits.rename(adapter, _pairs(rename))
        if scale is not None:
            adapter = edits.scale(adapter, scale)
        write = save if to else save_as_read
        path = write(adapter, out, format, dtype=dtype_of(dtype), base=folder)
    if json_output:
        print(
            json.dumps(
                {"out": str(path), "format": format, "modules": len(adapter.updates), "parameters": adapter.parameters}
            )
        )
        return
    say(
        f"{len(before.updates)} modules -> {len(adapter.updates)}, {before.parameters:,} parameters -> "
        f"{adapter.parameters:,}, "
        f"{time.monotonic() - started:.1f} s"
    )
    print(f"next: {inspect_call(path, adapter, format, base)}")


def _pairs(texts: list[str]) -> dict[str, str]:
    wrong = next((t for t in texts if t.count("=") != 1), None)
    if wrong is not None:
        raise ConfigError(f"--rename: '{wrong}' is not of the form OLD=NEW, e.g. model.language_model=model")
    return {old: new for old, _, new in (text.partition("=") for text in texts)}
