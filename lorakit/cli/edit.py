"""`lorakit edit`: an adapter made stronger or weaker, turned around, with fewer modules, or under other names."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from .shared.files import base_folder, dtype_of, free, inspect_call, read
from .shared.starting import starting


def edit(
    source: Annotated[str, typer.Argument(help="the adapter: folder, file or hub id")],
    out: Annotated[Path, typer.Argument(help="what to write")],
    scale: Annotated[float | None, typer.Option(help="every ΔW times this; -1 makes the adapter that undoes it")] = None,
    only: Annotated[list[str] | None, typer.Option(help="keep only modules whose name ends so; may be repeated")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="leave out modules whose name ends so; may be repeated")] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="OLD=NEW", help="what module names begin with; may be repeated")] = None,
    to: Annotated[str | None, typer.Option(help="format to write; default: the one it has")] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="precision of the numbers; default: as it is")] = None,
    base: Annotated[str | None, typer.Option(help="the base's folder, which GGUF needs")] = None,
    alpha: Annotated[float | None, typer.Option(help="for files that do not hold it (loralib, old MLX)")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Scale or negate an adapter, take modules out, rename them, change the precision; in this order: only, drop, rename, scale."""
    if scale is None and not (only or drop or rename or dtype):
        raise ConfigError(
            "edit changes nothing so\n  give --scale, --only, --drop, --rename or --dtype (lorakit convert changes the format alone)"
        )
    if scale == 0:
        raise ConfigError("--scale 0 would leave nothing of the adapter\n  give another number")
    with starting(f"reading {source}"):
        from ..adapter.algebra import edit as change
        from ..formats import format_of, save

    began = time.monotonic()
    format, folder = to or format_of(source), base_folder(base)
    out = free(out, format, force)
    adapter = before = read(source, alpha, folder)
    if only:
        adapter = change.select(adapter, only)
    if drop:
        adapter = change.prune(adapter, drop)
    if rename:
        adapter = change.rename(adapter, _pairs(rename))
    if scale is not None:
        adapter = change.scale(adapter, scale)
    path = save(adapter, out, format, dtype=dtype_of(dtype), base=folder)
    if json_output:
        print(json.dumps({"out": str(path), "format": format, "modules": len(adapter.updates), "parameters": adapter.parameters}))
        return
    print(
        f"{len(before.updates)} modules -> {len(adapter.updates)}, {before.parameters:,} parameters -> {adapter.parameters:,}, "
        f"{time.monotonic() - began:.1f} s"
    )
    print(f"next: {inspect_call(path, adapter, format, base)}")


def _pairs(texts: list[str]) -> dict[str, str]:
    wrong = next((t for t in texts if t.count("=") != 1), None)
    if wrong is not None:
        raise ConfigError(f"--rename: '{wrong}' is not OLD=NEW, e.g. model.language_model=model")
    return dict(text.split("=") for text in texts)  # type: ignore[misc]
