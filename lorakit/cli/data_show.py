"""`lorakit data show`: print rows, or pictures, as the model sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..data.pictures.settings import PictureSettings
from ..errors import ConfigError
from .shared.names import check_names
from .shared.next import command
from .shared.options import (
    AnswerAfter,
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
from .shared.pictures import show_pictures
from .shared.settings import with_flags
from .shared.starting import starting


def _show(
    flags: dict[str, Any],
    data: Annotated[
        str, typer.Argument(help="a JSONL, JSON, CSV or Parquet file, a folder of these or of pictures, or a hub id")
    ],
    model: Annotated[str, typer.Option(help="whose tokenizer, or size of pictures, to use")] = "embedded",
    split: Split = None,
    columns: Columns = None,
    template: DataTemplate = "auto",
    turns: Turns = "all",
    answer_after: AnswerAfter = None,
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
    rows: Annotated[int, typer.Option(min=0, help="how many rows, or captions, to print")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="pictures: draw a contact sheet with the crops into this PNG file")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Print text with the trained tokens marked, row lengths and duplicates; or pictures' captions, buckets and crops.

    The options from --resolution on are for pictures.
    """
    renamed = pairs(columns, "--columns") or None  # report a bad value before anything is loaded
    check_names(data=data)
    kwargs = template_kwargs(chat_template_kwargs)
    options = {
        "split": split,
        "columns": columns,
        "template": None if template == "auto" else template,
        "turns": None if turns == "all" else turns,
        "chat_template": chat_template,
        "chat_template_kwargs": chat_template_kwargs,
        "date": date,
        "answer_after": answer_after,
        "train_on": None if train_on == "completion" else train_on,
        "max_length": max_length,
        "on_long": None if on_long == "auto" else on_long,
    }
    with starting(f"reading {data}"):
        from ..data.pictures.find import is_pictures

        pictures = is_pictures(data, split)
    of_text = {name: value for name, value in options.items() if name not in ("split", "columns")}
    of_pictures = flags | {"out": out}
    _check_kind(data, pictures, of_text if pictures else of_pictures)
    if pictures:
        show_pictures(data, model, split, renamed, PictureSettings(**flags), rows, out, json_output, flags)
        return
    check_names(model)
    with starting(f"reading {data}"):
        from ..bases.load import end_tokens, load_tokenizer
        from ..data import preference_show, show
        from ..data.dataset import build
        from ..data.preference_items import build_preferences
        from ..data.preferences import is_preference
        from ..data.read import read_rows
        from ..data.split_text import answered, without_text
        from ..data.templates import ChatOptions, read_template, with_template
        from ..train.task_of_data import renamed as under_our_names

        tokenizer = load_tokenizer(model)
        if chat_template is not None:
            tokenizer = with_template(tokenizer, read_template(chat_template), chat_template)
        read = [*answered(read_rows(data, split, columns=renamed), answer_after, renamed)]
        how: dict[str, Any] = {
            "columns": without_text(renamed) if answer_after else renamed,
            "template": template,
            "max_length": "auto" if max_length is None else max_length,
            "on_long": on_long,
            "options": ChatOptions(kwargs, date),
            "ends": end_tokens(model),
        }
        preferences = bool(read) and is_preference(under_our_names(read[0].values, renamed or {}))
        if preferences:
            _check_preferences(data, {name: options[name] for name in ("turns", "train_on")})
        shown: Any = preference_show if preferences else show
        dataset: Any = (
            build_preferences(read, tokenizer, **how)
            if preferences
            else build(read, tokenizer, train_on=train_on, turns=turns, **how)
        )
    if json_output:
        print(json.dumps(shown.report(dataset)))
        return
    shown.show(dataset, tokenizer, rows)
    print(f"\nnext: {command('train', data=data, model=model, **options)}")


def _check_preferences(data: str, others: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that the loss of preferences leaves no choice about."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(f"{data} has preferences, whose loss is of the answers\n  remove {', '.join(given)}")


def _check_kind(data: str, pictures: bool, others: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option was given that is for the other kind of data. `others`: those options."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
    if given:
        kind, other = ("pictures", "text") if pictures else ("text", "pictures")
        raise ConfigError(f"{data} is {kind}, and {', '.join(given)} is for {other}\n  remove it, or name other data")


show = with_flags(PictureSettings, _show)
show.__name__ = "show"
