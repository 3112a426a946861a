"""Shared by `combine`, `resize` and `extract`: options, a progress line, and the report on the written adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .files import base_folder, dtype_of, inspect_call
from .output import output, say

if TYPE_CHECKING:
    from ...adapter.adapter import Adapter
    from ...adapter.algebra.resize import Resized

Out = Annotated[Path, typer.Argument(help="where to write the result")]
Rank = Annotated[int | None, typer.Option(min=1, help="maximum rank of the result")]
Keep = Annotated[
    float | None, typer.Option(min=0, max=1, help="keep this share of the energy Σσ² of each module, e.g. 0.99")
]
To = Annotated[
    str | None,
    typer.Option(
        help="format to write: any that `lorakit convert` writes; default: that of the (first) adapter, in its own "
        "spelling, where OUT can be such a file, else peft"
    ),
]
Alpha = Annotated[float | None, typer.Option(help="for loralib files, which do not store it")]
Dtype = Annotated[
    Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="precision to write; default: that of the result")
]
Base = Annotated[str | None, typer.Option(help="the base's folder, required to read or write GGUF")]
Force = Annotated[bool, typer.Option("--force", help="replace OUT if it exists")]
Modules = Annotated[bool, typer.Option("--modules", help="print a line per module")]
Json = Annotated[bool, typer.Option("--json", help="print the report as JSON")]


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress line on the terminal; yields a callback (name, done, total) that updates it."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda name, done, total: status.update(f"{what} {done}/{total} {name}")


def report(
    what: str,
    inputs: list[Adapter],
    result: Resized,
    written: tuple[Path, str],
    started: float,
    modules: bool,
    json_output: bool,
) -> None:
    """Print the result of `what`: ranks, parameters, error, and the next command. `written`: what `write` returned."""
    path, next_command = written
    before, after = sum(a.parameters for a in inputs), result.adapter.parameters
    if json_output:
        facts: dict[str, Any] = {
            "out": str(path),
            "rank": result.adapter.rank,
            "parameters": {"before": before, "after": after},
        }
        print(json.dumps(facts | result.to_dict()))
        return
    if modules:
        from ...analysis.tables import Table

        rows = [[m.module, str(m.before), str(m.after), f"{m.error:.3g}"] for m in result.modules]
        output().print(Table("", ["module", "rank\nbefore", "after", "error"], rows))
    ranks = sorted({f.rank for f in result.adapter.factors.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "dense updates"
    say(f"{what}: {len(result.modules)} modules, {rank}; {before:,} parameters -> {after:,}, {seconds_since(started)}")
    worst = result.worst
    if worst is not None and worst.error > 0:
        kept = f"{result.energy:.2%} of the energy kept"
        say(f"relative error {result.error:.3g} ({kept}); largest: {worst.module}, {worst.error:.3g}")
    else:
        print("exact")
    print(f"next: {next_command}")


def write(
    adapter: Adapter, out: Path, to: str, dtype: str | None, base: str | None, as_read: bool = False
) -> tuple[Path, str]:
    """Save the adapter (`as_read`: in the spelling of the file that it is from). Returns the written path and the
    `lorakit inspect` command for it.
    """
    from ...formats import save, save_as_read

    path = (save_as_read if as_read else save)(adapter, out, to, dtype=dtype_of(dtype), base=base_folder(base))
    return path, inspect_call(path, adapter, to, base)


def seconds_since(started: float) -> str:
    """Format the seconds since `started`, a `time.monotonic()`."""
    return f"{time.monotonic() - started:.1f} s"
