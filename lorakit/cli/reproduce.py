"""`lorakit reproduce`: repeat the paper's experiments on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..experiments.suite import NAMES, PAPER
from .shared.output import output, say
from .shared.starting import starting

OUT = Path("runs/reproduce")
_NAMES_HELP = "; ".join(f"{name}: {about}" for name, about in NAMES.items())


def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[TABLE]...", help=f"{_NAMES_HELP}. Default: all but address")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="list the tables and what they take by default")] = False,
    out: Annotated[Path, typer.Option(help="the folder of results; a killed table continues there")] = OUT,
    seeds: Annotated[int | None, typer.Option(min=1, max=64, help="how many seeds each run has")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="optimizer steps of a run")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="test rows for which texts are generated")] = None,
    list_file: Annotated[
        Path | None, typer.Option("--file", help="address: your copy of the list (the form of AllData.json)")
    ] = None,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="measure nothing; write tables and plots again from the stored results")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="start tables over that are there already")] = False,
    full: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="write a folder that repeats an experiment of the paper at its own size, with your copy of weights "
            "and data: roberta-glue, gpt2-e2e, gpt3-shapes",
        ),
    ] = None,
) -> None:
    """Repeat the paper's experiments on the embedded model and data: tables, plots, and whether they agree."""
    from ..experiments import suite

    if show_list:
        _list()
        return
    if full is not None:
        _full(full, names, out)
        return
    selected = list(dict.fromkeys(suite.check_name(name) for name in names or NAMES))
    if not names:
        selected.remove("address")
    if list_file is not None and "address" not in selected:
        raise ConfigError("--file is for the table address\n  omit it, or name the table: lorakit reproduce address")
    budgets = suite.budgets(selected, {"seeds": seeds, "steps": steps, "rows": rows})
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder (--out)")

    from ..experiments import report

    if table_only:
        for name in selected if names else report.measured(out):
            content = report.stored(out, name)
            _show(name, content, report.draw(out, name, content))
        return
    with starting("loading torch and transformers"):
        from ..bench.suite import machine
        from ..experiments.work import Work, start_over
        from ..train import loop  # noqa: F401 (imports torch and transformers, which takes seconds)

    for name in selected:
        if force:
            start_over(out / name)
        file = list_file if name == "address" else None
        work = Work(out / name, budgets[name], _progress, file)
        print(f"{name}: {NAMES[name]}", flush=True)
        result = suite.load(name).run(work)
        flags = f" --file {list_file}" if file else ""
        content = report.store(out, name, result, report.command(name, budgets[name]) + flags, work.seconds, machine())
        _show(name, content, report.draw(out, name, content))
    say(f"next: read {out / report.PAGE}; lorakit reproduce --table-only --out {out} writes the tables again")


def _progress(line: str) -> None:
    print(line, flush=True)


def _show(name: str, content: dict, files: list[Path]) -> None:
    from ..experiments.suite import load

    experiment, result = load(name), content["result"]
    console = output()
    say("\n" + " ".join(experiment.TITLE.split()))
    for table in experiment.tables(result):
        console.print(table)
    for finding in experiment.findings(result):
        say(f"{finding.verdict}: {finding.claim}\n    {finding.figures}")
    say(f"{content['seconds']:.0f} CPU s; {content['command']}; {', '.join(map(str, files))}\n")


def _list() -> None:
    from ..experiments.suite import load

    say(f"tables of {PAPER}:")
    for name, about in NAMES.items():
        say(f"  {name:<14} {about};{load(name).BUDGET.flags() or ' no training'}")


def _full(name: str, tables: list[str] | None, out: Path) -> None:
    from ..experiments.full import write

    if tables:
        raise ConfigError(f"--full {name} needs no tables (got {', '.join(tables)})\n  give one or the other")
    path = write(name, out / "full" / name if out == OUT else out)
    say(f"wrote {path}\nnext: read {path / 'README.md'}")
