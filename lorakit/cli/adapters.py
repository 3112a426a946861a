"""`lorakit inspect` and `lorakit merge`: adapters as files."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import ConfigError
from .files import base_folder, dtype_of, numbers, read
from .starting import starting

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter


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
    told = describe_adapter(load_adapter(source, alpha, folder), source, folder, format_of(source))
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


def load_adapter(source: str, alpha: float | None = None, base: Path | None = None) -> Adapter:
    """An adapter; where it holds NaN or infinity, the error says in which keys, all of them."""
    from ..analysis.inspect import not_finite
    from ..errors import AdapterError

    try:
        return read(source, alpha, base)
    except AdapterError as error:
        bad = not_finite(source) if "not finite" in str(error) else {}
        if not bad:
            raise
        keys = "".join(f"\n  {key}: {count:,}" for key, count in list(bad.items())[:20])
        more = f"\n  and {len(bad) - 20} more keys" if len(bad) > 20 else ""
        raise AdapterError(f"{error}\n{len(bad)} keys of {source} hold such numbers:{keys}{more}") from error


def merge(
    base: Annotated[
        str, typer.Argument(help="a checkpoint folder, a diffusers pipeline's, a diffusion model's .safetensors, or 'embedded'")
    ],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER... OUT", help="one adapter or several, then what to write")],
    weights: Annotated[str | None, typer.Option(help="one for each adapter, e.g. 0.7,0.3; default: 1 each")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="precision of the merged weights; default: the base's")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="give a tied LM head a weight of its own")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="merge although an adapter was trained on another base")] = False,
    alpha: Annotated[float | None, typer.Option(help="for files that do not hold it (loralib, old MLX)")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Merge adapters into a checkpoint's files, one tensor in memory at a time, and check the result by reading it again."""
    from rich.console import Console

    if len(adapters) < 2:
        raise ConfigError("merge takes BASE, one adapter or several, and OUT\n  lorakit merge BASE ADAPTER OUT")
    with starting("reading the base and the adapters"):
        from ..checkpoint import merge_checkpoint

    *sources, out = adapters
    folder = base_folder(base)
    assert folder is not None
    console = Console()
    with console.status("merging") as status:
        report = merge_checkpoint(
            folder, sources, out, weights=numbers(weights), alpha=alpha, force=force,
            dtype=dtype_of(dtype), untie=untie, force_base=force_base,
            on_tensor=lambda name, done, total: status.update(f"{done}/{total} {name}"),
        )  # fmt: skip
    if json_output:
        print(json.dumps(report.to_dict()))
        return
    console.print(report.table())
    if (folder / "config.json").is_file():
        print(f"next: lorakit generate 'Once upon a time' --model {quote(out)}")
    else:
        print(f"next: load {quote(out)} as its base is loaded")
