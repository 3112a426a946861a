"""`lorakit card`: write a model card for an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .shared.files import base_folder
from .shared.next import command
from .shared.output import say
from .shared.share import Alpha, Base, BaseModel, Json, License
from .shared.starting import starting


def card(
    source: Annotated[str, typer.Argument(help="a run's folder, or an adapter in any format: folder, file or hub id")],
    out: Annotated[Path | None, typer.Option(help="the file to write; default: README.md next to the adapter")] = None,
    title: Annotated[str | None, typer.Option(help="the heading; default: what the adapter is for")] = None,
    description: Annotated[str | None, typer.Option(help="intended uses and limitations (Markdown)")] = None,
    license: License = None,
    base_model: BaseModel = None,
    data: Annotated[str | None, typer.Option(help="the training data's name or hub id, if not recorded")] = None,
    repository: Annotated[
        str | None, typer.Option(help="OWNER/NAME, for the code on the card; lorakit push fills it in")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="a file with the output of `lorakit eval ROWS --adapter ADAPTER --json`"),
    ] = None,
    evaluated_on: Annotated[str | None, typer.Option("--eval-on", help="the name or hub id of its rows")] = None,
    alpha: Alpha = None,
    base: Base = None,
    force: Annotated[bool, typer.Option("--force", help="replace a README.md that lorakit did not write")] = False,
    json_output: Json = False,
) -> None:
    """Write a model card: what the adapter is, how to use it, how it was trained and how it scored, if recorded."""
    with starting(f"reading {source}"):
        from ..errors import ConfigError
        from ..share import card_of, write

        content = card_of(
            source,
            title=title,
            description=description,
            license=license,
            base_model=base_model,
            data=data,
            repository=repository,
            evaluation=evaluation,
            evaluated_on=evaluated_on,
            alpha=alpha,
            base=base_folder(base),
        )
    if out is None and not Path(source).expanduser().exists():
        raise ConfigError(f"{source} is not a local path\n  give a file for its card: --out README.md")
    path = out.expanduser() if out is not None else content.path
    write(content.text, path, force)
    if json_output:
        print(json.dumps({"card": str(path), "missing": content.missing}, ensure_ascii=False))
        return
    print(f"written: {path}")
    if content.missing:
        print("left out, because unknown:")
        for line in content.missing:
            say(f"  {line}")
    print(f"next: {command('push', source, repository or 'OWNER/NAME', alpha=alpha, base=base)}")
