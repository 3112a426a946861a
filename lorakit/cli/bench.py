"""`lorakit bench`: run lorakit's benchmarks on this machine."""

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
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=f"{_NAMES_HELP}. Default: all")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="small shapes and few rounds, for a quick check and a rough idea of the speed"),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the machine and the rows to FILE")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="also plot the tables that have a plot, as PNG")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "all"] | None,
        typer.Option(
            help="for train-step, image-step, trainer, mixed and joint; default: those with native matrix products here"
        ),
    ] = None,
) -> None:
    """Measure lorakit and its peers side by side on this machine, and print a table with an explanation for each."""
    from ..bench import suite

    selected = list(dict.fromkeys(names or NAMES))
    for name in selected:
        suite.check_name(name)  # report a wrong name before anything runs
    if plots is not None:
        _check_plots(plots)

    from rich.console import Console

    with starting("loading the tables"):
        from ..io.atomic import write_text

        tables = {name: suite.load(name) for name in selected}
        measured, left_out = suite.precisions(precision)

    console = Console(width=None if sys.stdout.isatty() else 140)  # in a file, wide tables stay readable
    facts = suite.machine()
    console.print(suite.machine_line(facts), highlight=False)
    if left_out and any(suite.measures_precisions(name) for name in selected):
        console.print(left_out, highlight=False)
    warnings.simplefilter("ignore", FutureWarning)  # deprecations between peers and transformers
    measured_tables: dict[str, Any] = {}
    missing: list[str] = []
    for name, module in tables.items():
        console.print(f"\n[bold]{name}[/bold]", highlight=False)
        console.print(" ".join(module.TITLE.split()), highlight=False, markup=False)
        started = time.perf_counter()
        try:
            rows = suite.measure(name, quick, measured)
        except suite.MissingPeer as error:
            console.print(str(error), highlight=False, markup=False)
            missing.append(name)
            continue
        seconds = time.perf_counter() - started
        console.print(suite.table(rows))
        for remark in suite.remarks(rows):
            console.print(remark, markup=False, highlight=False)
        console.print(
            f"{seconds:.0f} s; lorakit bench "
            f"{name}{' --quick' if quick else ''}{f' --precision {precision}' if precision else ''}",
            highlight=False,
        )
        measured_tables[name] = {"title": module.TITLE, "rows": rows, "seconds": round(seconds, 1), "quick": quick}
        if json_file is not None:  # after each table: a later one may fail
            write_text(
                json_file,
                json.dumps({"machine": facts, "tables": measured_tables}, indent=1, ensure_ascii=False) + "\n",
            )
        plot = suite.save_plot(name, rows, plots) if plots is not None else None
        if plot is not None:
            console.print(f"plot: {plot}", highlight=False)
    if missing:
        console.print(f"\nnot measured: {', '.join(missing)}; {suite.INSTALL}", highlight=False, markup=False)
        raise typer.Exit(1)


def _check_plots(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder (--plots)")
