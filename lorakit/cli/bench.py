"""`lorakit bench`: our figures on the user's machine."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..bench.suite import NAMES
from ..errors import ConfigError
from .shared.starting import starting

_NAMES_HELP = "; ".join(f"{name}: {about}" for name, about in NAMES.items())


def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=f"{_NAMES_HELP}. Without names: all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small shapes and few rounds: does it run, and roughly how fast")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write machine and rows to a file")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="FOLDER", help="also draw the tables that have a picture, as PNG")] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "all"] | None,
        typer.Option(help="of train-step, trainer, mixed and joint; default: those that this machine multiplies itself"),
    ] = None,
) -> None:
    """Measure lorakit and its peers on this machine, side by side, and print each table with what its rows compare."""
    from ..bench import suite

    wanted = list(dict.fromkeys(names or NAMES))
    for name in wanted:
        suite.check_name(name)  # so that a wrong name is told before anything runs
    if plots is not None:
        _check_plots(plots)

    from rich.console import Console

    with starting("loading the tables"):
        from ..io.atomic import write_text

        tables = {name: suite.load(name) for name in wanted}
        measured, left_out = suite.precisions(precision)

    console = Console(width=None if sys.stdout.isatty() else 140)  # in a file, wide tables stay readable
    facts = suite.machine()
    console.print(suite.machine_line(facts), highlight=False)
    if left_out and any(suite.measures_precisions(name) for name in wanted):
        console.print(left_out, highlight=False)
    warnings.simplefilter("ignore", FutureWarning)  # what peers and transformers tell each other
    found: dict[str, Any] = {}
    missing: list[str] = []
    for name, module in tables.items():
        console.print(f"\n[bold]{name}[/bold]", highlight=False)
        console.print(" ".join(module.TITLE.split()), highlight=False, markup=False)
        began = time.perf_counter()
        try:
            rows = suite.measure(name, quick, measured)
        except suite.MissingPeer as error:
            console.print(str(error), highlight=False, markup=False)
            missing.append(name)
            continue
        seconds = time.perf_counter() - began
        console.print(suite.table(rows))
        console.print(
            f"{seconds:.0f} s; lorakit bench {name}{' --quick' if quick else ''}{f' --precision {precision}' if precision else ''}",
            highlight=False,
        )
        found[name] = {"title": module.TITLE, "rows": rows, "seconds": round(seconds, 1), "quick": quick}
        if json_file is not None:  # after each table: a later one may fail
            write_text(json_file, json.dumps({"machine": facts, "tables": found}, indent=1, ensure_ascii=False) + "\n")
        drawn = suite.save_plot(name, rows, plots) if plots is not None else None
        if drawn is not None:
            console.print(f"plot: {drawn}", highlight=False)
    if missing:
        console.print(f"\nnot measured: {', '.join(missing)}; {suite.INSTALL}", highlight=False, markup=False)
        raise typer.Exit(1)


def _check_plots(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder (--plots)")
