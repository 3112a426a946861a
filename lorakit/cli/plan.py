"""`lorakit plan`: estimate a run's memory and time before anything is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from ..config import LoraSettings, Quantization, part
from ..errors import ConfigError
from ..methods import method_of
from ..tasks import task_of
from ..tasks.text.settings import Lengths
from ..train.config import METHODS, TrainConfig
from .shared.output import say
from .shared.settings import read_config, with_flags
from .shared.starting import starting

if TYPE_CHECKING:
    from ..plan.packed import Packing
    from ..plan.planner import Planner

# The settings that affect memory: all of a method, which say what is trained, and these of the run and its task. A
# --config file may have the others too.
_OF_RUNS = (
    "add_tokens",
    "task",
    "labels",
    "revision",
    "model",
    "max_length",
    "validation",
    "method",
    "batch_size",
    "micro_batch",
    "packing",
    "precision",
    "quantize",
    "double",
    "compute_dtype",
    "gradient_checkpointing",
    "offload_activations",
    "rope_scaling",
    "memory",
    "optimizer",
    "trust_remote_code",
)
_SETTINGS = {*_OF_RUNS, *(name for method in METHODS for name in method_of(method).settings.model_fields)}
_COMPARED = ("full", "lora")  # shown beside the run's own method
_LENGTHS = (256, 1024, 4096, 16384)
_LENGTH = 1024  # tokens, if none is given: no data is read


def _plan(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option("--config", help="a YAML file (lorakit init writes one); flags override it")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="plan for this kind of device; auto: this machine's")
    ] = "auto",
    longest: Annotated[
        bool, typer.Option("--longest", help="print the longest row that fits, with each way to save memory on and off")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
) -> None:
    """Estimate a training run's memory and time from the base's config alone, without loading weights."""
    settings = TrainConfig(**{"data": "-"} | (read_config(config) if config else {}) | flags)

    with starting("reading the base's config"):
        from ..train.start import resolved

        settings = resolved(settings)
        if part(settings, LoraSettings).trainable_tokens or settings.add_tokens:
            task = task_of(settings.task)
            settings = cast(TrainConfig, task.resolved(settings, task.processor(settings), {}))
        import torch
        from rich.console import Console
        from transformers.utils import logging

        from ..bases.device import choose_device
        from ..bases.stored_weights import storage_of
        from ..plan.machine import multiply_rate
        from ..plan.planner import MOST_ROWS
        from ..plan.show import bars, grid, numbers
        from ..plan.units import show_bytes
        from ..train import defaults
        from ..train.memory import SMALLEST, allowed, packing_of, planner_for

    # What transformers notes on building a model (a slower kernel, an odd RoPE factor) concerns runs, not a plan.
    logging.set_verbosity_error()
    local = choose_device().value
    target = local if device == "auto" else torch.device(device)
    here = target.type == local.type
    if not here and settings.memory == "auto":
        raise ConfigError(f"--device {device}: this machine has none\n  give its memory, such as --memory 24GB")
    limit = allowed(settings, target)
    if settings.precision == "auto" and not here:
        settings = settings.replace(precision="bf16")  # what GPUs multiply natively
    # How many rows will be held out is unknown without data: assume a full batch, unless there is no validation.
    validation = 0 if settings.validation == 0 else settings.batch_size
    if not task_of(settings.task).traced:
        _show_static(settings, target, limit, json_output)
        return
    given, stored = part(settings, Quantization), storage_of(task_of(settings.task).blueprint(settings))
    if stored is not None:
        _check_method(settings, stored.title)
    dense = settings.replace(find_lr=False, **Quantization().model_dump())
    how = given if given.quantize else Quantization(quantize=SMALLEST)  # to compare with, where none is given
    planners: dict[str, Planner] = {}
    for name in sorted({*_COMPARED, settings.method}):
        method, own_settings = method_of(name), dense.by_method(name)
        dtype = method.precision(own_settings, target).value
        if not method.keeps_base and stored is not None:
            continue  # it cannot train quantized weights
        planner = planner_for(own_settings, dtype, target, validation=validation)
        planners[planner.name] = planner
        if method.keeps_base and planner.settings.packing is None:
            quantized = planner.stored(cast("Packing", packing_of(own_settings, planner.base, how)))
            if quantized.shell.packed:
                planners[quantized.name] = quantized
    own = _own(planners, settings)
    if longest:
        _show_longest(planners, settings, limit.total if limit else None, own, json_output)
        return
    dtype = own.settings.dtype
    if not json_output:
        print("simulating a step on shapes, which takes a few seconds ...", file=sys.stderr, flush=True)
    max_length = part(settings, Lengths).max_length
    length = min(own.positions or _LENGTH, _LENGTH) if max_length == "auto" else int(max_length)
    if own.positions is not None and length > own.positions:
        raise ConfigError(
            f"max_length is {length:,}, but {settings.model} has {own.positions:,} positions\n"
            f"  set max_length to {own.positions} or less"
        )
    rows = defaults.micro_batch(settings, length, target, 1)
    estimates = [planner.estimate(rows.value, length) for planner in planners.values()]
    memory = limit.total if limit else None
    fit_rows = {name: p.most_rows(length, memory) for name, p in planners.items()} if memory else {}
    fit_lengths = {name: p.longest(rows.value, memory) for name, p in planners.items()} if memory else {}
    lengths = sorted({n for n in _LENGTHS if n <= (own.positions or n)} | {estimates[0].length})
    fitting = {n: own.most_rows(n, memory) for n in lengths} if memory else {}
    chosen = next(e for e in estimates if e.method == own.name)
    flops = chosen.flops * settings.batch_size / chosen.rows
    seconds = flops / multiply_rate(dtype, local) if here else None

    if json_output:
        print(
            json.dumps(
                {
                    "model": settings.model,
                    "parameters": chosen.parameters,
                    "method": settings.method,
                    "device": target.type,
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
        f"{settings.model}: {chosen.parameters:,} parameters, {str(dtype).removeprefix('torch.')} on {target.type}, "
        f"{settings.optimizer}; "
        f"{settings.batch_size} x {chosen.length} tokens per step, {chosen.rows} at once ({rows.reason})\n",
        markup=False,
        highlight=False,
    )
    console.print(numbers(estimates, memory, fit_rows, fit_lengths, MOST_ROWS, own.positions))
    console.print()
    console.print(bars(estimates, memory, console.width), end="", no_wrap=True, crop=False)
    if limit is not None:
        console.print(
            f"\nlargest batches within {show_bytes(limit.total)} ({limit.source}), {own.name}:",
            markup=False,
            highlight=False,
        )
        console.print(grid(fitting, MOST_ROWS))
    say(f"\n{_time(flops, seconds)}")
    if own.settings.packing is not None:
        say(f"{own.shell.packed} linears are stored as {own.settings.packing.storage.title}")
    smaller = next((e for e in estimates if e.method == f"{how.quantize} {settings.method}"), None)
    fits = memory is None or chosen.total <= memory
    suggested = not fits and smaller is not None and smaller is not chosen and smaller.total <= cast(int, memory)
    print(_next(settings, config, flags, fits, how.quantize if suggested else None))


def _show_longest(
    planners: Mapping[str, Planner], settings: TrainConfig, memory: int | None, own: Planner, as_json: bool
) -> None:
    """Print the longest row that fits into `memory` bytes. `own`: the planner of the run that was asked for."""
    from rich.console import Console

    from ..plan.longest import beyond, longest_rows, refusals, table
    from ..plan.units import show_bytes

    if memory is None:
        raise ConfigError("--longest: how much memory there is, is not known\n  give it: --memory 24GB")
    if not as_json:
        print("simulating steps on shapes, which takes a few seconds ...", file=sys.stderr, flush=True)
    found, positions = longest_rows(planners.values(), memory), own.positions
    if as_json:
        rows = [
            {"method": each.name, "way": each.way, "tokens": each.tokens, "refused": each.refused} for each in found
        ]
        print(json.dumps({"model": settings.model, "memory": memory, "positions": positions, "longest": rows}))
        return
    say(f"{settings.model}, one row at once within {show_bytes(memory)}:\n")
    titles = {name: planner.title for name, planner in planners.items()}
    Console().print(table(found, titles))
    for line in refusals(found):
        say(f"\n{line}")
    if (more := beyond(found, positions, settings.model)) is not None:
        say(f"\n{more}")
    method = "" if settings.method == METHODS[0] else f" --method {settings.method}"
    run = f"lorakit train --data YOUR.jsonl --model {quote(settings.model)}{method} --micro-batch 1"
    saves = not any(each.refused for each in found if each.name == own.name)
    print(f"next: {run}{' --gradient-checkpointing --offload-activations' if saves else ''}")


def _check_method(settings: TrainConfig, stored: str) -> None:
    """Raise ConfigError if the method trains weights that the base has quantized, as `stored` says."""
    if not method_of(settings.method).keeps_base:
        raise ConfigError(
            f"{settings.model} is quantized ({stored}), and quantized weights cannot be trained (method: "
            f"{settings.method})\n  give the unquantized base, or use method: lora"
        )


def _own(planners: Mapping[str, Planner], settings: TrainConfig) -> Planner:
    """Return the planner of the run that was asked for. Raises ConfigError if its base cannot be quantized."""
    if settings.quantize is None:
        return next(p for p in planners.values() if p.settings.method == settings.method)
    named = f"{settings.quantize} {settings.method}"
    if named in planners:
        return planners[named]
    stored = next((p.settings.packing for p in planners.values() if p.settings.packing is not None), None)
    if stored is not None:
        raise ConfigError(
            f"{settings.model} is quantized already: {stored.storage.title}\n"
            f"  omit quantize: {settings.quantize}, or give the unquantized base"
        )
    raise ConfigError(
        f"{settings.model} has no linear that can be quantized to {settings.quantize}\n"
        f"  omit quantize: {settings.quantize}, or choose another"
    )


def _show_static(settings: TrainConfig, device: Any, limit: Any, json_output: bool) -> None:
    """Print what a run on pictures or sound holds throughout; its activations are not estimated."""
    from rich.console import Console

    from ..analysis.tables import Table
    from ..model.attach import DEFAULT
    from ..plan.machine import overhead
    from ..plan.static import static_estimate
    from ..plan.units import show_bytes

    dtype = method_of(settings.method).precision(settings, device).value
    estimate = static_estimate(settings, dtype, DEFAULT, overhead(device))
    memory = limit.total if limit else None
    if json_output:
        found = {"model": settings.model, "device": device.type, "memory": memory, "estimate": estimate.to_dict()}
        print(json.dumps(found))
        return
    rows = [[part, show_bytes(size)] for part, size in estimate.parts.items() if size]
    Console().print(Table("", ["held throughout", "bytes"], [*rows, ["together", show_bytes(estimate.total)]]))
    say(
        f"{settings.model}: {estimate.parameters:,} parameters, {str(dtype).removeprefix('torch.')} on {device.type}; "
        f"{estimate.trained:,} trained"
    )
    say(
        "activations are not estimated for pictures: they grow with their size and micro_batch, and "
        "gradient_checkpointing needs less of them"
    )
    if memory is not None and estimate.total > memory:
        print(f"next: the run does not fit into {show_bytes(memory)}; try a lower --precision or a smaller base")
    else:
        print(f"next: lorakit train --task {settings.task} --model {quote(settings.model)} --data FOLDER")


def _next(
    settings: TrainConfig, config: Path | None, flags: dict[str, Any], fits: bool, quantize: str | None = None
) -> str:
    """Return the next command, or what to change if the run does not fit. `quantize`: with what it would fit."""
    if quantize is not None:
        flags = flags | {"quantize": quantize}
        fits = True
    if not fits:
        return (
            "next: the run does not fit; try lorakit plan with --micro-batch 1, a smaller --max-length, "
            "--gradient-checkpointing, a smaller base, or more --memory"
        )
    file = f" --config {quote(str(config))}" if config else ""
    options = "".join(f" {_flag(name, value)}" for name, value in flags.items() if name != "model")
    return f"next: lorakit train{file} --model {quote(settings.model)}{options} --data FILE"


def _flag(name: str, value: Any) -> str:
    """Format a setting as its command-line flag."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    items = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
    return f"--{name} {quote(','.join(map(str, items)) if isinstance(items, list) else str(items))}"


def _time(flops: float, seconds: float | None) -> str:
    operations = f"a step takes {flops / 1e12:,.3g} TFLOP"
    if seconds is None:
        return operations
    duration = (
        f"{seconds:.2g} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.0f} h"
    )
    return f"{operations}: at least {duration} here, for matrix products alone at the rate just measured (rough)"


plan = with_flags(TrainConfig, _plan, skip=tuple(name for name in TrainConfig.model_fields if name not in _SETTINGS))
plan.__name__ = "plan"
