"""`lorakit image generate`: draw pictures with a diffusers pipeline and adapters."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ...bases.hub_reach import check_hub
from ...errors import ConfigError
from ..shared.names import check_names
from ..shared.options import Precision
from ..shared.output import say
from ..shared.starting import starting
from . import request


class CommandClass(TyperCommand):
    """Takes `--scale 0 0.5 1`, an option with several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, request.spaced_scales(args))


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; each is a picture")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="the pipeline: 'embedded' (default), a folder, a .safetensors checkpoint, or a hub id"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="PATH or NAME=PATH, with :WEIGHT behind it, or weights of parts (:unet=0.7,text_encoder=0); "
            "repeatable: all are used together"
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="a text file with further prompts, one a line")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="negative prompt")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="seed of the noise (default 0)")] = None,
    count: Annotated[int, typer.Option(min=1, help="pictures of each prompt, with the seeds from --seed on")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps; default: the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="guidance scale; default: the pipeline's")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="pixels; default: the pipeline's")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="pixels; default: the pipeline's")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="sampler: 'Euler a', 'DPM++ 2M Karras', DDIM, a class of diffusers")
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="a further argument of the pipeline's call; repeatable"),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="multiply the adapters' weights by each: --scale 0 0.5 1")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS,COLUMNS",
            help="axes of the grid: adapter (each one beside the base), scale, prompt, seed; none: no grid",
        ),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="merge the adapters into the weights first")] = False,
    from_png: Annotated[
        Path | None,
        typer.Option("--from", metavar="PNG", help="make this picture again, with what other options change"),
    ] = None,
    out: Annotated[Path, typer.Option(help="a folder, or the PNG of the picture or grid")] = Path("pictures"),
    batch_size: Annotated[int | None, typer.Option(min=1, help="pictures in one pass; default: by their size")] = None,
    precision: Precision = "auto",
    force: Annotated[bool, typer.Option("--force", help="replace OUT.png")] = False,
    force_base: Annotated[
        bool,
        typer.Option("--force-base", help="use adapters of another base; with --from, another model or adapter, too"),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print what was made as JSON")] = False,
) -> None:
    """Draw pictures with a diffusion pipeline and adapters. Each PNG says how it was made, and can be made again."""
    from ...generate.pictures.png_text import read_png

    began = time.perf_counter()
    made = None if from_png is None else read_png(from_png.expanduser())
    texts = request.prompts(prompts or [], prompts_file) or ([made.prompt] if made else [])
    if not texts:
        raise ConfigError(
            "there is no prompt\n"
            "  expected one: lorakit image generate 'a panda in a meadow', --prompts FILE, or --from PNG"
        )
    axes, scales, uses = request.axes(grid), request.scales(scale), request.adapters(adapter or [])
    asked = {
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "width": width,
        "height": height,
        "sampler": scheduler,
        "arguments": request.arguments(argument or []) or None,
        "seed": seed,
    }
    out = request.output_path(out, force)
    model = model or (made.model_source if made else None) or "embedded"
    check_names(adapters=[use.source for use in uses])
    if model != "embedded" and model.count("/") <= 1:  # before torch is imported
        check_hub(model, "a diffusers pipeline's folder, a .safetensors checkpoint, a hub id, or 'embedded'")
    with starting(f"loading {model}", quiet=json_output):
        from .drawing import load, uses_of
        from .job import plan

        recorded = made.precision if made and precision == "auto" else None
        loaded = load(model, uses_of(uses, made), recorded or precision, force_base, made, from_png)
        asked = {name: value for name, value in asked.items() if value is not None}
        job = plan(loaded, asked, made, texts, count, scales, axes)
        pictures = job.draw(merged, batch_size)
    if not json_output:
        for line in job.lines():
            say(line)
    written = job.write(pictures, out, wants_grid=grid != "none", say=None if json_output else print)
    result = written.compared_with(from_png, made) if made is not None and from_png is not None else None
    seconds = time.perf_counter() - began
    if json_output:
        print(json.dumps({**written.to_dict(), **(result.to_dict() if result else {}), "seconds": round(seconds, 3)}))
        return
    if result is not None:
        say(result.said)
    number = len(written.pictures)
    say(f"{number} picture{'s' if number > 1 else ''} in {seconds:.1f} s")
