"""`lorakit train`: train one adapter, or resume a run."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..methods import method_of
from ..train.config import TrainConfig
from ..train.interrupt import exit_code
from ..train.launch import asked_for, command
from .shared.names import check_names
from .shared.next import after_training
from .shared.output import say
from .shared.settings import read_config, with_flags
from .shared.starting import starting

if TYPE_CHECKING:
    from ..train.run import Result

_SKIP = ("base",)


def _train(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option("--config", help="a YAML file (lorakit init writes one); flags override it")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only the last line")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Train one adapter. Started again on its own folder, a run resumes where it stopped."""
    values = (read_config(config) if config else {}) | flags
    if "data" not in values:
        raise ConfigError("no training data\n  give --data FILE, or a --config that names it (lorakit init writes one)")
    start(values, quiet, json_output)


def start(values: dict[str, Any], quiet: bool, json_output: bool) -> None:
    """Train with these settings, print how the run ended, and exit with its code."""
    settings = TrainConfig(**values)

    data = None if values.get("slider_positive") else settings.data  # a slider has no data
    check_names(settings.model, data)
    with ExitStack() as until_shown:
        what = f"loading the base{f' and {data}' if data else ''}"
        until_shown.enter_context(starting(what, quiet or os.environ.get("RANK", "0") != "0"))
        from ..train.progress import Progress
        from ..train.start import resolved
        from ..train.task_of_data import with_task
        from ..train.train import train as run

        settings = resolved(with_task(settings))
        result = run(settings, Progress(quiet=quiet or json_output, before=until_shown.close))
    if os.environ.get("RANK", "0") == "0":  # of several processes (accelerate launch, torchrun) only the first prints
        if json_output:
            print(json.dumps(dataclasses.asdict(result), default=str))
        else:
            _show(result, settings, quiet)
    if result.adapter is None:
        raise typer.Exit(exit_code(result.stopped))


def _show(result: Result, settings: TrainConfig, quiet: bool) -> None:
    """Print how the run ended, and which commands come next."""
    from ..train.run_folder import RunFolder

    if result.adapter is None:
        resume = command(asked_for(), settings.out) + (" --quiet" if quiet else "")
        say(f"stopped by {result.stopped} after step {result.step} of {result.steps}; saved")
        print(f"next: {resume}   # resumes there")
        return
    end = f"{result.step} steps"
    if result.stopped:
        end = f"stopped early at step {result.step}: no better held-out loss since step {result.best_step}"
    best = f", held-out loss {result.best_loss:.4f} (step {result.best_step})" if result.best_loss is not None else ""
    written = f"report: {RunFolder(settings.out).report}; {method_of(settings.method).result}: {result.adapter}"
    placed = _placed(result.adapter)
    written += f" ({placed})" if placed else ""
    say(f"{end} in {result.seconds:.0f} s{best}; {written}")
    print(after_training(settings, result.adapter))


def _placed(adapter: Path) -> str:
    """Return how many modules of each component a pipeline's adapter has, as read back from its file."""
    from ..io.json_object import read_json

    ours = adapter / "lorakit.json"
    placed = read_json(ours).get("placed") if ours.is_file() else None
    return ", ".join(f"{name}: {count} modules" for name, count in placed.items()) if isinstance(placed, dict) else ""


train = with_flags(TrainConfig, _train, skip=_SKIP)
train.__name__ = "train"
