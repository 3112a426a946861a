"""`lorakit inspect`: what is in an adapter, or which modules a model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from .shared.files import base_folder, read_checked
from .shared.starting import starting


def inspect(
    source: Annotated[str, typer.Argument(help="an adapter (folder, file or hub id), or a model folder with --modules")],
    alpha: Annotated[float | None, typer.Option(help="for loralib files, which do not hold it")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="list every module (of a model: those that can be adapted)")] = False,
    base: Annotated[str | None, typer.Option(help="the base's checkpoint folder, or 'embedded': norms relative to its weights")] = None,
    heat: Annotated[bool, typer.Option("--map", help="a heat map of the modules in the terminal")] = False,
    quantity: Annotated[
        Literal["norm", "relative", "effective_rank", "stable_rank"] | None,
        typer.Option(help="what the heat map shows; default: relative with --base, else norm"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write the heat map (.png or .svg)")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """What is in an adapter: format, base, targets, ranks, strength, norms of its update, training; or which modules a model has."""
    with starting(f"reading {source}"):
        from ..analysis.inspect import describe_adapter, describe_model, is_model

    if is_model(source):
        if base is not None or heat or plot is not None:
            raise ConfigError(f"{source} is a model: --base, --map and --plot are for adapters")
        model = describe_model(source)
        print(json.dumps(model.to_dict())) if json_output else model.show(modules)
        return
    from ..analysis.heatmap import kind_of
    from ..analysis.heatmap import plot as draw
    from ..formats import format_of

    shown = quantity or ("relative" if base is not None else "norm")
    if shown == "relative" and base is None:
        raise ConfigError("--quantity relative compares with the base's weights\n  give their folder: --base FOLDER")
    if plot is not None:
        kind_of(plot)  # before the work
    folder = base_folder(base)
    told = describe_adapter(read_checked(source, alpha, folder), source, folder, format_of(source))
    if plot is not None and told.modules:
        draw(told.grids(shown), plot, source)
    if json_output:
        print(json.dumps(told.to_dict()))
        return
    told.show(modules)
    if heat:
        from rich.console import Console

        console = Console()
        for grid in told.grids(shown):
            for table in grid.tables(console.width):
                console.print(table)
    if plot is not None:
        print(f"written: {plot}" if told.modules else "there is no module to draw")
