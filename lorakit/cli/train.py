"""`lorakit train`: train one adapter, or go on with a run."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..methods import method_of
from ..tasks import DEFAULT
from ..train.config import TrainConfig
from .shared.settings import read_config, with_flags
from .shared.starting import starting

if TYPE_CHECKING:
    from ..train.loop import Result

_SKIP = ("base",)


def _train(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option("--config", help="a YAML file (lorakit init writes one); flags win over it")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but the last line")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Train one adapter. Started again on its own folder, a run goes on where it stopped."""
    values = (read_config(config) if config else {}) | flags
    if "data" not in values:
        raise ConfigError("no training data: give --data FILE, or a --config that names it (lorakit init writes one)")
    settings = TrainConfig(**values)

    with starting("reading the base and the data", quiet or os.environ.get("RANK", "0") != "0"):
        from ..train.progress import Progress
        from ..train.train import train as run

    result = run(settings, Progress(quiet=quiet or json_output))
    if os.environ.get("RANK", "0") == "0":  # of several processes (accelerate launch, torchrun) the first one speaks
        print(json.dumps(dataclasses.asdict(result), default=str) if json_output else _last_words(result, settings))
    if result.adapter is None:
        raise typer.Exit(1)


def _last_words(result: Result, settings: TrainConfig) -> str:
    """How it ended, and what to type next."""
    if result.adapter is None:
        again = f"lorakit train --config {shlex.quote(settings.out + '/config.yaml')}"
        return (
            f"stopped by {result.stopped} after step {result.step} of {result.steps}; saved\n"
            f"next: {again}   # goes on from there"
        )
    how = f"{result.step} steps"
    if result.stopped:
        how = f"stopped early at step {result.step}: no better held-out loss since step {result.best_step}"
    best = f", held-out loss {result.best_loss:.4f} (step {result.best_step})" if result.best_loss is not None else ""
    method = method_of(settings.method)
    task = "" if settings.task == DEFAULT else f" --task {settings.task}"
    judge = f"lorakit eval {shlex.quote(settings.data)} {method.flags(settings.model, str(result.adapter))}{task}"
    return f"{how} in {result.seconds:.0f} s{best}; {method.result}: {result.adapter}\nnext: {judge}"


train = with_flags(TrainConfig, _train, skip=_SKIP)
train.__name__ = "train"
