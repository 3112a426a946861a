"""`lorakit merge`: merge adapters into a checkpoint's files."""

from __future__ import annotations

import json
from shlex import quote
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from .shared.files import base_folder, dtype_of, parse_weights, say_if_unfinished
from .shared.names import check_names
from .shared.options import ModelType
from .shared.output import output, say
from .shared.starting import starting


def merge(
    base: Annotated[
        str,
        typer.Argument(
            help="a checkpoint folder, a diffusers pipeline's folder, a diffusion model's .safetensors, or 'embedded'"
        ),
    ],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER... OUT", help="one or several adapters, then the output")
    ],
    weights: Annotated[str | None, typer.Option(help="one per adapter, e.g. 0.7,0.3; default: 1 each")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="precision of the merged weights; default: the base's"),
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="give a tied LM head its own weight")] = False,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="merge even if an adapter was trained on another base")
    ] = False,
    alpha: Annotated[float | None, typer.Option(help="for files that do not store it (loralib, old MLX)")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="list every merged module")] = False,
    model_type: ModelType = None,
    onto: Annotated[
        str | None,
        typer.Option(help="the unquantized folder of a quantized BASE: merge into that, and report what differs"),
    ] = None,
    requantize: Annotated[
        Literal["same", "nf4", "fp4", "int8", "gptq", "awq"] | None,
        typer.Option(help="quantize a quantized BASE's weights again; without it they are written as ordinary ones"),
    ] = None,
    keep_at_least: Annotated[
        float,
        typer.Option(help="share of its ΔW that each requantized weight must keep; below that nothing is written"),
    ] = 0.5,
    json_output: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Merge adapters into a checkpoint's files, one tensor in memory at a time, and verify the result."""
    if len(adapters) < 2:
        raise ConfigError("merge expects BASE, one or several adapters, and OUT\n  lorakit merge BASE ADAPTER OUT")
    check_names(adapters=adapters[:-1])
    with starting("reading the base and the adapters"):
        from ..analysis.merge_tables import notes, tables
        from ..checkpoint import merge_checkpoint

    *sources, out = adapters
    folder = base_folder(base)
    assert folder is not None
    for source in sources:
        say_if_unfinished(source)
    console = output()
    with console.status("merging") as status:
        report = merge_checkpoint(
            folder,
            sources,
            out,
            weights=parse_weights(weights),
            alpha=alpha,
            model_type=model_type,
            force=force,
            dtype=dtype_of(dtype),
            untie=untie,
            force_base=force_base,
            onto=base_folder(onto),
            requantize=requantize,
            keep_at_least=keep_at_least,
            on_tensor=lambda name, done, total: status.update(f"{done}/{total} {name}"),
        )
    if json_output:
        print(json.dumps(report.to_dict()))
        return
    for table in tables(report, modules):
        console.print(table)
    for note in notes(report):
        say(f"note: {note}")
    say(report.headline())
    if (folder / "config.json").is_file():
        print(f"next: lorakit generate 'Once upon a time' --model {quote(out)}")
    else:
        print(f"next: load {quote(out)} the way you load its base")
