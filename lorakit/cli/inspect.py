"""`lorakit inspect`: show what an adapter contains, or which modules a model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from .shared.files import base_folder, read_checked
from .shared.names import check_names
from .shared.options import ModelType
from .shared.output import output
from .shared.starting import starting


def inspect(
    source: Annotated[
        str, typer.Argument(help="an adapter (folder, file or hub id), or a model folder with --modules")
    ],
    alpha: Annotated[float | None, typer.Option(help="for loralib files, which do not store it")] = None,
    modules: Annotated[
        bool, typer.Option("--modules", help="list every module (for a model: every module that can be adapted)")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="the base's checkpoint folder, or 'embedded': norms relative to its weights")
    ] = None,
    heat: Annotated[bool, typer.Option("--map", help="print a heat map of the modules")] = False,
    quantity: Annotated[
        Literal["norm", "relative", "effective_rank", "stable_rank"] | None,
        typer.Option(help="what the heat map shows; default: relative with --base, otherwise norm"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write the heat map to a file (.png or .svg)")] = None,
    model_type: ModelType = None,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Show what an adapter contains (format, base, ranks, scales, norms, training), or which modules a model has."""
    shown = quantity or ("relative" if base is not None else "norm")
    if shown == "relative" and base is None:
        raise ConfigError("--quantity relative compares with the base's weights\n  give their folder: --base FOLDER")
    check_names(adapters=[source])
    with starting(f"reading {source}"):
        from ..analysis.heatmap import kind_of
        from ..analysis.heatmap import plot as draw
        from ..analysis.inspect import describe_adapter, describe_model, is_model
        from ..formats import format_of

        model = is_model(source)
        if model and (base is not None or heat or plot is not None):
            raise ConfigError(f"{source} is a model: --base, --map and --plot are for adapters")
        if plot is not None:
            kind_of(plot)  # check the ending before the work
        if model:
            contents = describe_model(source)
        else:
            folder = base_folder(base)
            facts = describe_adapter(read_checked(source, alpha, folder, model_type), source, folder, format_of(source))
            if plot is not None and facts.modules:
                draw(facts.grids(shown), plot, source)
    if model:
        print(json.dumps(contents.to_dict())) if json_output else contents.show(modules, output())
        return
    if json_output:
        print(json.dumps(facts.to_dict()))
        return
    console = output()
    facts.show(modules, console)
    if heat:
        for grid in facts.grids(shown):
            for table in grid.tables(console.width):
                console.print(table)
    if plot is not None:
        print(f"written: {plot}" if facts.modules else "no plot: the adapter changes no module")
