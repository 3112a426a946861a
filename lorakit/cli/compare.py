"""`lorakit compare`: how alike two adapters are, and how much they would disturb each other."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from .shared.starting import starting


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="an adapter (folder, file or hub id)")],
    b: Annotated[str, typer.Argument(metavar="B", help="another of the same base")],
    base: Annotated[
        str | None, typer.Option(help="the base's checkpoint folder, or 'embedded': set ΔW against W (amplification factor)")
    ] = None,
    module: Annotated[list[str] | None, typer.Option(help="φ for all i, j of modules with this name or ending; may be repeated")] = None,
    of: Annotated[
        Literal["A", "B", "right", "left"], typer.Option(help="whose directions φ is of: the factor A's (the paper's), B's, or ΔW's own")
    ] = "A",
    modules: Annotated[bool, typer.Option("--modules", help="list every module")] = False,
    plot: Annotated[Path | None, typer.Option(help="write a picture (.png or .svg)")] = None,
    html: Annotated[Path | None, typer.Option(help="write a report, one HTML file")] = None,
    alpha: Annotated[float | None, typer.Option(help="for loralib files, which do not hold it")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Two adapters of one base: cosine, principal angles and subspace similarity of their updates, and their interference when stacked."""
    from rich.console import Console

    with starting(f"reading {a} and {b}"):
        from ..analysis.compare import compare as set_side_by_side
        from ..analysis.compare_report import plot as draw
        from ..analysis.compare_report import summary, tables, write_html
        from ..analysis.heatmap import kind_of
        from ..formats import TAKES_ALPHA, format_of
        from .shared.files import base_folder, read_checked

    if plot is not None:
        kind_of(plot)  # before the work
    folder = base_folder(base)
    # alpha is for those files alone that do not say it themselves.
    asks = [alpha if alpha is not None and format_of(source) in TAKES_ALPHA else None for source in (a, b)]
    first, second = (read_checked(source, own, folder) for source, own in zip((a, b), asks, strict=True))
    with Console(stderr=True).status("comparing") as status:
        found = set_side_by_side(
            first, second, (a, b), modules=module or (), of=of, base=folder,
            on_module=lambda _, done, total: status.update(f"comparing {done}/{total}"),
        )  # fmt: skip
        if plot is not None:
            draw(found, plot)
        if html is not None:
            write_html(found, html)
    if json_output:
        print(json.dumps(found.to_dict()))
        return
    for line in summary(found):
        print(line)
    console = Console()
    for table in tables(found, modules):
        console.print(table)
    for path in (plot, html):
        if path is not None:
            print(f"written: {path}")
    if html is None:
        print(f"next: lorakit compare {quote(a)} {quote(b)} --html report.html")
