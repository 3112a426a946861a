"""`lorakit data show`: print rows as the model sees them."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from .shared.names import check_names
from .shared.next import command
from .shared.options import (
    ChatTemplate,
    ChatTemplateKwargs,
    Columns,
    DataTemplate,
    Date,
    Split,
    Turns,
    pairs,
    template_kwargs,
)
from .shared.starting import starting


def show(
    data: Annotated[str, typer.Argument(help="a JSONL, JSON, CSV or Parquet file, a folder, or a hub id")],
    model: Annotated[str, typer.Option(help="whose tokenizer to use")] = "embedded",
    split: Split = None,
    columns: Columns = None,
    template: DataTemplate = "auto",
    turns: Turns = "all",
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    date: Date = None,
    train_on: Annotated[Literal["completion", "all"], typer.Option(help="which tokens are trained")] = "completion",
    max_length: Annotated[
        int | None, typer.Option(help="maximum row length in tokens; default: the data's 99th percentile")
    ] = None,
    on_long: Annotated[
        Literal["auto", "drop", "cut", "split"], typer.Option(help="what to do with longer rows")
    ] = "auto",
    rows: Annotated[int, typer.Option(min=0, help="how many rows to print")] = 3,
    json_output: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Print rows with the trained tokens marked, a length histogram, duplicates, and the effect of the length limit."""
    renamed = pairs(columns, "--columns") or None  # report a bad value before anything is loaded
    check_names(model, data)
    kwargs = template_kwargs(chat_template_kwargs)
    with starting(f"reading {data}"):
        from ..bases.load import end_tokens, load_tokenizer
        from ..data.dataset import build
        from ..data.read import read_rows
        from ..data.show import report
        from ..data.show import show as print_rows
        from ..data.templates import ChatOptions, read_template, with_template

        tokenizer = load_tokenizer(model)
        if chat_template is not None:
            tokenizer = with_template(tokenizer, read_template(chat_template), chat_template)
        dataset = build(
            read_rows(data, split),
            tokenizer,
            columns=renamed,
            template=template,
            train_on=train_on,
            max_length="auto" if max_length is None else max_length,
            on_long=on_long,
            turns=turns,
            options=ChatOptions(kwargs, date),
            ends=end_tokens(model),
        )
    if json_output:
        print(json.dumps(report(dataset)))
        return
    print_rows(dataset, tokenizer, rows)
    options = {
        "split": split,
        "columns": columns,
        "template": None if template == "auto" else template,
        "turns": None if turns == "all" else turns,
        "chat_template": chat_template,
        "chat_template_kwargs": chat_template_kwargs,
        "date": date,
        "train_on": None if train_on == "completion" else train_on,
        "max_length": max_length,
        "on_long": None if on_long == "auto" else on_long,
    }
    print(f"\nnext: {command('train', data=data, model=model, **options)}")
