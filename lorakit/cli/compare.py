"""`lorakit compare`: measure how similar two adapters are, and how much they interfere when both are active."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .shared.next import command
from .shared.output import output, say
from .shared.starting import starting


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="an adapter (folder, file or hub id)")],
    b: Annotated[str, typer.Argument(metavar="B", help="another adapter of the same base")],
    base: Annotated[
        str | None,
        typer.Option(help="the base's checkpoint folder, or 'embedded': compare ΔW with W (amplification factor)"),
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="show φ for all i, j of modules with this name or ending; repeatable")
    ] = None,
    of: Annotated[
        Literal["A", "B", "right", "left"],
        typer.Option(help="singular directions for φ: of the factor A (as in the paper), of B, or of ΔW"),
    ] = "A",
    modules: Annotated[bool, typer.Option("--modules", help="list every module")] = False,
    plot: Annotated[Path | None, typer.Option(help="write a plot (.png or .svg)")] = None,
    html: Annotated[Path | None, typer.Option(help="write a report as one HTML file")] = None,
    alpha: Annotated[float | None, typer.Option(help="for loralib files, which do not store it")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Compare two adapters of one base: cosine, angles and subspace similarity of their updates, and interference."""
    with starting(f"reading {a} and {b}"):
        from rich.console import Console

        from ..analysis.compare import compare as compare_adapters
        from ..analysis.compare_report import plot as draw
        from ..analysis.compare_report import summary, tables, write_html
        from ..analysis.heatmap import kind_of
        from ..formats import TAKES_ALPHA, format_of
        from .shared.files import base_folder, read_checked

        if plot is not None:
            kind_of(plot)  # check the ending before the work
        folder = base_folder(base)
        # --alpha applies only to files that do not store it.
        alphas = [alpha if alpha is not None and format_of(source) in TAKES_ALPHA else None for source in (a, b)]
        first, second = (read_checked(source, own, folder) for source, own in zip((a, b), alphas, strict=True))
    with Console(stderr=True).status("comparing") as status:
        comparison = compare_adapters(
            first,
            second,
            (a, b),
            modules=module or (),
            of=of,
            base=folder,
            on_module=lambda _, done, total: status.update(f"comparing {done}/{total}"),
        )
        if plot is not None:
            draw(comparison, plot)
        if html is not None:
            write_html(comparison, html)
    if json_output:
        print(json.dumps(comparison.to_dict()))
        return
    for line in summary(comparison):
        say(line)
    console = output()
    for table in tables(comparison, modules):
        console.print()
        console.print(table)
    console.print()
    for path in (plot, html):
        if path is not None:
            print(f"written: {path}")
    if html is None:
        options = {"base": base, "module": module, "of": None if of == "A" else of, "alpha": alpha}
        print(f"next: {command('compare', a, b, **options, html='report.html')}")
