"""`lorakit extract`: a LoRA out of a fine-tuned checkpoint."""

from __future__ import annotations

import json
import time
from shlex import quote
from typing import Annotated

import typer

from .shared.algebra import Dtype, Force, Json, Modules, Out, Rank, progress, seconds_since, write
from .shared.files import base_folder, free
from .shared.starting import starting


def extract(
    base: Annotated[
        str, typer.Argument(help="the base: a checkpoint folder, a pipeline's, a diffusion model's .safetensors, or 'embedded'")
    ],
    tuned: Annotated[str, typer.Argument(help="the checkpoint that was fine-tuned from it")],
    out: Out,
    rank: Rank = None,
    keep: Annotated[float | None, typer.Option(min=0, max=1, help="hold this share of each weight's change, e.g. 0.95")] = None,
    target: Annotated[list[str] | None, typer.Option(help="only modules whose name ends so; may be repeated")] = None,
    save_rest: Annotated[
        bool,
        typer.Option("--save-rest", help="keep biases, norms and all else that changed whole (kohya: but biases of modules with factors)"),
    ] = False,
    seed: Annotated[int, typer.Option(help="of the random projections")] = 0,
    to: Annotated[str | None, typer.Option(help="format to write; default: peft, of a diffusion model kohya")] = None,
    dtype: Dtype = None,
    force: Force = False,
    modules: Modules = False,
    json_output: Json = False,
) -> None:
    """A LoRA out of a fine-tuned checkpoint and its base, one tensor in memory at a time."""
    with starting("reading the checkpoints"):
        from ..checkpoint.extract import extract as take
        from ..errors import listing

    before, after = base_folder(base), base_folder(tuned)
    assert before is not None
    assert after is not None
    image = before.is_file() or (before / "model_index.json").is_file()
    to = to or ("kohya" if image else "peft")
    out = free(out, to, force)
    began = time.monotonic()
    with progress("extracting") as tell:
        done = take(
            before, after, rank, keep=keep, targets=target, save_rest=save_rest, seed=seed,
            on_tensor=tell,
        )  # fmt: skip
    path, look = write(done.adapter, out, to, dtype, base)
    if json_output:
        print(json.dumps({"out": str(path), "parameters": done.adapter.parameters, **done.to_dict()}))
        return
    if modules:
        for m in done.modules:
            print(f"  {m.module}  {'x'.join(map(str, m.shape))}  changed {m.change:.3g}  rank {m.rank}  captured {m.captured:.1%}")
    print(f"{len(done.modules)} changed matrices, largest rank {done.adapter.rank}; {done.unchanged} tensors unchanged")
    if done.rest:
        left = [name for name in done.rest if name not in done.kept]
        told = f", {len(left)} left out ({listing(left, 3)})" if left else ""
        print(f"{len(done.rest)} other tensors changed: {len(done.kept)} kept whole{told}")
    print(f"captured: {done.captured:.2%} of the change (squared norm); {done.adapter.parameters:,} parameters, {seconds_since(began)}")
    for doubt in done.warnings:
        print(f"note: {doubt}")
    again = look if image or to != "peft" else f"lorakit eval DATA --model {quote(base)} --adapter {quote(str(path))}"
    print(f"next: {again}")
