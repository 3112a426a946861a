"""`lorakit plan`: memory and time before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..config import part
from ..errors import ConfigError
from ..methods import method_of
from ..tasks.text.settings import Lengths
from ..train.config import METHODS, TrainConfig
from .shared.settings import read_config, with_flags
from .shared.starting import starting

if TYPE_CHECKING:
    from ..plan.planner import Planner

# What decides memory; a file given with --config may hold the others too.
_ASKED = (
    "rank",
    "dropout",
    "bias",
    "targets",
    "exclude",
    "layers",
    "rank_pattern",
    "save_modules",
    "packed",
    "task",
    "labels",
    "revision",
    "model",
    "max_length",
    "validation",
    "method",
    "batch_size",
    "micro_batch",
    "precision",
    "gradient_checkpointing",
    "memory",
    "trust_remote_code",
)
_LENGTHS = (256, 1024, 4096, 16384)
_LENGTH = 1024  # where none is given, as no data is read


def _plan(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option("--config", help="a YAML file (lorakit init writes one); flags win over it")
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "rmsprop", "sgd"], typer.Option(help="whose state is counted; lorakit trains with AdamW")
    ] = "adamw",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="plan for this kind of device; auto: the one found")
    ] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
) -> None:
    """Memory and time of a training run before it starts, from the base's config alone: no weights are loaded."""
    settings = TrainConfig(**{"data": "-"} | (read_config(config) if config else {}) | flags)

    with starting("reading the base's config"):
        import torch
        from rich.console import Console

        from ..bases.device import choose_device
        from ..plan.estimate import FOUR_BIT, STATE_COPIES
        from ..plan.machine import multiply_rate
        from ..plan.planner import MOST_ROWS
        from ..plan.show import bars, grid, numbers
        from ..plan.units import show_bytes
        from ..train import defaults
        from ..train.memory import allowed, planner_for

    found = choose_device().value
    where = found if device == "auto" else torch.device(device)
    here = where.type == found.type
    if not here and settings.memory == "auto":
        raise ConfigError(f"--device {device}: there is none here, so say what memory it has (--memory 24GB)")
    may = allowed(settings, where)
    if settings.precision == "auto" and not here:
        settings = settings.replace(precision="bf16")  # what such devices multiply
    # Without data it is not known how many rows will be held out: a whole batch of them, unless none are wanted.
    options: dict[str, Any] = {
        "state_copies": STATE_COPIES[optimizer],
        "validation": 0 if settings.validation == 0 else settings.batch_size,
    }
    planners: dict[str, Planner] = {}
    for name in sorted(METHODS):
        method, asked = method_of(name), settings.replace(method=name, find_lr=False)
        planners[name] = planner_for(asked, method.precision(asked, where).value, where, **options)
        if method.keeps_base:
            planners[FOUR_BIT + name] = planners[name].four_bit()
    own, dtype = planners[settings.method], planners[settings.method].setting.dtype
    if not json_output:
        print("running the step on shapes alone, some seconds ...", file=sys.stderr, flush=True)
    asked_length = part(settings, Lengths).max_length
    length = min(own.positions or _LENGTH, _LENGTH) if asked_length == "auto" else int(asked_length)
    if own.positions is not None and length > own.positions:
        raise ConfigError(f"max_length is {length:,}, and {settings.model} has {own.positions:,} positions")
    rows = defaults.micro_batch(settings, length, where, 1)
    estimates = [planner.estimate(rows.value, length) for planner in planners.values()]
    memory = may.total if may else None
    fit_rows = {name: p.most_rows(length, memory) for name, p in planners.items()} if memory else {}
    fit_lengths = {name: p.longest(rows.value, memory) for name, p in planners.items()} if memory else {}
    lengths = sorted({n for n in _LENGTHS if n <= (own.positions or n)} | {estimates[0].length})
    fitting = {n: own.most_rows(n, memory) for n in lengths} if memory else {}
    chosen = next(e for e in estimates if e.method == settings.method)
    flops = chosen.flops * settings.batch_size / chosen.rows
    seconds = flops / multiply_rate(dtype, found) if here else None

    if json_output:
        print(
            json.dumps(
                {
                    "model": settings.model,
                    "parameters": chosen.parameters,
                    "method": settings.method,
                    "device": where.type,
                    "memory": memory,
                    "estimates": [e.to_dict() for e in estimates],
                    "most_rows": fit_rows,
                    "longest": fit_lengths,
                    "most_rows_by_length": fitting,
                    "step_flops": int(flops),
                    "step_seconds_at_least": seconds,
                }
            )
        )
        return
    console = Console()
    console.print(
        f"{settings.model}: {chosen.parameters:,} parameters, {str(dtype).removeprefix('torch.')} on {where.type}, "
        f"{optimizer}; "
        f"{settings.batch_size} x {chosen.length} tokens a step, {chosen.rows} at once ({rows.reason})\n",
        markup=False,
        highlight=False,
    )
    console.print(numbers(estimates, memory, fit_rows, fit_lengths, MOST_ROWS, own.positions))
    console.print()
    console.print(bars(estimates, memory), end="", no_wrap=True, crop=False)
    if may is not None:
        console.print(
            f"\nwhat fits {show_bytes(may.total)} ({may.source}), {settings.method}:", markup=False, highlight=False
        )
        console.print(grid(fitting, MOST_ROWS))
    print(f"\n{_time(flops, seconds)}")
    print("* over a folder that bitsandbytes saved in 4 bits; lorakit does not quantize a base itself yet")
    print(_next(settings, config, flags, chosen.total <= memory if memory else True))


def _next(settings: TrainConfig, config: Path | None, flags: dict[str, Any], fits: bool) -> str:
    """What to type now."""
    if not fits:
        return (
            "next: it does not fit: lorakit plan again with --micro-batch 1, a smaller --max-length, "
            "--gradient-checkpointing, a smaller base,"
            " or more --memory"
        )
    file = f" --config {quote(str(config))}" if config else ""
    given = "".join(f" {_flag(name, value)}" for name, value in flags.items() if name != "model")
    return f"next: lorakit train{file} --model {quote(settings.model)}{given} --data FILE"


def _flag(name: str, value: Any) -> str:
    """A setting as it was given."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    items = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
    return f"--{name} {quote(','.join(map(str, items)) if isinstance(items, list) else str(items))}"


def _time(flops: float, seconds: float | None) -> str:
    counted = f"a step is {flops / 1e12:,.3g} TFLOP"
    if seconds is None:
        return counted
    length = (
        f"{seconds:.2g} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.0f} h"
    )
    return f"{counted}: at least {length} here, by matrix products alone at the rate just measured; a rough figure"


plan = with_flags(TrainConfig, _plan, skip=tuple(name for name in TrainConfig.model_fields if name not in _ASKED))
plan.__name__ = "plan"
