"""`lorakit eval`: base and adapters on the same rows, side by side."""

from __future__ import annotations

import json
from shlex import quote
from typing import Annotated

import typer

from .shared.loading import load
from .shared.options import Columns, DataTemplate, Model, Precision, Split, pairs
from .shared.starting import starting

_NO_LIMIT = 1 << 30


def evaluate(
    data: Annotated[str, typer.Argument(help="rows to judge on; a `references` column may list several right answers")],
    model: Model = "embedded",
    adapter: Annotated[list[str] | None, typer.Option(help="PATH or NAME=PATH; may be repeated")] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="also generate answers: BLEU, chrF, ROUGE-L, exact match")] = True,
    split: Split = None,
    columns: Columns = None,
    template: DataTemplate = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="judge the first rows only")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="rows at once")] = 32,
    samples: Annotated[int, typer.Option(min=0, help="answers to print")] = 3,
    precision: Precision = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Loss and perplexity on the trained positions, and the quality of generated answers, base and adapters side by side."""
    from rich.console import Console

    renamed = pairs(columns, "--columns") or None  # before anything is loaded
    with starting(f"reading the rows and the base {model}"):
        from ..data.dataset import build
        from ..data.read import read_rows
        from ..evaluate.evaluate import evaluate as judge
        from ..generate.generate import positions_of

    loaded = load(model, adapter or [], precision)
    base, tokenizer, names = loaded.model, loaded.tokenizer, loaded.names
    longest = positions_of(base) or _NO_LIMIT
    rows = read_rows(data, split, limit)
    dataset = build(rows, tokenizer, columns=renamed, template=template, max_length=longest)
    console = Console()
    with console.status("loading") as status:
        report = judge(
            base, tokenizer, dataset.items, [None, *names], generate=text and dataset.shape != "text", max_new_tokens=max_new_tokens,
            samples=samples, batch_size=batch_size, on_rows=lambda what, count: status.update(f"{what}: {count} more rows"),
        )  # fmt: skip
    if json_output:
        print(json.dumps(report.to_dict() | {"dropped": dataset.dropped}, ensure_ascii=False))
        return
    table = report.sample_table()
    if table is not None:
        console.print(table)
    console.print(report.table())
    if dataset.dropped:
        print(f"{dataset.dropped} rows are longer than the model's {longest} positions and were left out")
    if names:
        print(f"next: lorakit chat --model {quote(model)} --adapter {quote((adapter or [''])[-1])}")
    else:
        print(f"next: lorakit train --data {quote(data)} --model {quote(model)}")
