"""`lorakit sweep`: train many adapters together."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ..errors import ConfigError
from ..train.config import TrainConfig
from ..train.interrupt import exit_code
from ..train.sweep.sweep_config import MAX_RUNS, Sweep, expand
from .shared.names import check_names
from .shared.next import after_training, command
from .shared.output import output, say
from .shared.settings import read_config, with_flags
from .shared.starting import starting

if TYPE_CHECKING:
    from ..train.sweep.sweep import Outcome

_SKIP = ("base", "find_lr")


def _sweep(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option("--config", help="a YAML file as for train, lists where swept; flags override it")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs and stop")] = False,
    max_runs: Annotated[int, typer.Option(min=1, help="refuse to start more runs than this")] = MAX_RUNS,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only the last lines")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> None:
    """Train many adapters together on one base. Any setting may be a list of values; the runs are their product.

    --rank 4,16 --learning-rate 1e-4,2e-4 makes four runs. A list of lists: --targets '[all-linear, [q_proj, v_proj]]'.
    Started again on its own folder, a sweep resumes where it stopped.
    """
    values = (read_config(config) if config else {}) | {name: spread(name, value) for name, value in flags.items()}
    if "data" not in values:
        raise ConfigError("no training data\n  give --data FILE, or a --config that names it")
    plan = expand(values, max_runs)
    first = next(iter(plan.runs.values()))
    check_names(first.model, first.data)
    with ExitStack() as until_shown:
        until_shown.enter_context(starting(f"loading {'' if dry_run else 'the base and '}the data", quiet))
        from ..train.sweep.sweep_task import for_data

        plan = for_data(plan, values, max_runs)
        if dry_run:
            until_shown.close()
            _list(plan, json_output)
            return
        from ..train.sweep.sweep import sweep as start
        from ..train.sweep.sweep_progress import SweepProgress

        outcome = start(plan, SweepProgress(quiet=quiet or json_output, before=until_shown.close))
    if json_output:
        print(json.dumps(outcome.to_dict()))
    else:
        _print_outcome(outcome, plan, quiet)
    if not outcome.winners:
        raise typer.Exit(exit_code(outcome.stopped))


def spread(name: str, value: Any) -> Any:
    """Split a flag's text at commas into a list of values, unless its setting is a list or mapping itself.

    Raises ConfigError for an empty value or an invalid list.
    """
    holds_one = not any(kind in str(TrainConfig.model_fields[name].annotation) for kind in ("list[", "dict["))
    if not (holds_one and isinstance(value, str)):
        return value
    if name == "data" and Path(value).exists():  # a file may have a comma in its name
        return value
    if value.startswith("[") and value.endswith("]"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} is not a valid list: {getattr(error, 'problem', error)}"
            ) from error
    parts = [part.strip() for part in value.split(",")]
    if len(parts) == 1:
        return value
    if not all(parts):
        raise ConfigError(f"--{name.replace('_', '-')} {value}: there is an empty value between commas")
    return [yaml.safe_load(part) if part[0] not in "[{&*!%@`>|'\"" else part for part in parts]


def _list(plan: Sweep, json_output: bool) -> None:
    runs = {name: plan.values_of(name) for name in plan.runs}
    if json_output:
        print(json.dumps({"out": str(plan.out), "swept": list(plan.swept), "runs": runs}))
        return
    for name in runs:
        print(name)
    say(f"{len(runs)} runs, to be written to {plan.out}/runs; remove --dry-run to train them")


def _print_outcome(outcome: Outcome, plan: Sweep, quiet: bool) -> None:
    """Print the leaderboard, how the sweep ended, and the next command."""
    from ..train.sweep import noise
    from ..train.sweep.leaderboard import table

    if not quiet:
        console = output()
        console.print()
        console.print(table(outcome.entries, plan.swept, f"by {outcome.criterion}"))
        if outcome.over_seeds:
            console.print()
            console.print(noise.table(outcome.over_seeds, plan.swept))
        elif noise.SEED not in plan.swept:
            console.print("one seed each: differences may be noise; --seed 0,1,2 says which are larger")
    resume = command("sweep", config=f"{plan.out}/sweep.yaml", quiet=quiet)
    if outcome.stopped:
        print(f"stopped by {outcome.stopped}; saved\nnext: {resume}   # resumes there")
        return
    if not outcome.winners:
        say(f"every run failed; the errors are in {outcome.leaderboard}")
        return
    plots = "".join(f"; plot: {plot}" for plot in outcome.plots)
    say(f"{len(outcome.entries)} runs in {outcome.seconds:.0f} s; leaderboard: {outcome.leaderboard}{plots}")
    for group, adapter in outcome.winners.items():
        best = next(entry for entry in outcome.entries if entry.group == group)
        say(f"winner{f' of {group}' if group else ''}: {best.name}, loss {best.score:.4f}; adapter: {adapter}")
    print(after_training(plan.runs[outcome.entries[0].name], next(iter(outcome.winners.values()))))


sweep = with_flags(TrainConfig, _sweep, skip=_SKIP)
sweep.__name__ = "sweep"
