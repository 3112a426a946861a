"""`lorakit extract`: extract a LoRA from a fine-tuned checkpoint."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from .shared.algebra import Dtype, Force, Json, Modules, Out, Rank, progress, seconds_since, write
from .shared.files import base_folder, output_path
from .shared.next import command
from .shared.output import output, say
from .shared.starting import starting


def extract(
    base: Annotated[
        str,
        typer.Argument(
            help="the base: a checkpoint folder, a pipeline's, a diffusion model's .safetensors, or 'embedded'"
        ),
    ],
    tuned: Annotated[str, typer.Argument(help="the checkpoint fine-tuned from it")],
    out: Out,
    rank: Rank = None,
    keep: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="keep this share of the energy of each weight's change, e.g. 0.95"),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="only modules with this name ending; repeatable")] = None,
    save_rest: Annotated[
        bool,
        typer.Option(
            "--save-rest",
            help="save changed biases, norms and all else in full (kohya: except biases of modules with factors)",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the random projections")] = 0,
    to: Annotated[
        str | None, typer.Option(help="format to write; default: peft, or kohya for a diffusion model")
    ] = None,
    dtype: Dtype = None,
    force: Force = False,
    modules: Modules = False,
    json_output: Json = False,
) -> None:
    """Extract a LoRA from a fine-tuned checkpoint and its base, with one tensor in memory at a time."""
    with starting("reading the checkpoints"):
        from ..checkpoint.extract import extract as extract_adapter
        from ..errors import listing

    before, after = base_folder(base), base_folder(tuned)
    assert before is not None
    assert after is not None
    image = before.is_file() or (before / "model_index.json").is_file()
    to = to or ("kohya" if image else "peft")
    out = output_path(out, to, force)
    started = time.monotonic()
    with progress("extracting") as on_tensor:
        result = extract_adapter(
            before, after, rank, keep=keep, targets=target, save_rest=save_rest, seed=seed, on_tensor=on_tensor
        )
    path, inspect = write(result.adapter, out, to, dtype, base)
    if json_output:
        print(json.dumps({"out": str(path), "parameters": result.adapter.parameters, **result.to_dict()}))
        return
    if modules:
        from ..analysis.tables import Table

        rows = [
            [m.module, "x".join(map(str, m.shape)), f"{m.change:.3g}", str(m.rank), f"{m.captured:.1%}"]
            for m in result.modules
        ]
        output().print(Table("", ["module", "shape", "changed", "rank", "captured"], rows))
    say(
        f"{len(result.modules)} changed matrices, largest rank {result.adapter.rank}; {result.unchanged} tensors "
        "unchanged"
    )
    if result.rest:
        omitted = [name for name in result.rest if name not in result.kept]
        note = f", {len(omitted)} left out ({listing(omitted, 3)})" if omitted else ""
        say(f"{len(result.rest)} other tensors changed: {len(result.kept)} saved in full{note}")
    size = f"{result.adapter.parameters:,} parameters, {seconds_since(started)}"
    say(f"captured: {result.captured:.2%} of the change (squared norm); {size}")
    for warning in result.warnings:
        say(f"note: {warning}")
    evaluate = command("eval", "TEST.jsonl", model=base, adapter=str(path))
    print(f"next: {inspect if image or to != 'peft' else evaluate}")
