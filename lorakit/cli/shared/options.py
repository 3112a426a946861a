"""Options shared by several commands, so that they read and mean the same in each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ...errors import ConfigError

Model = Annotated[str, typer.Option(help="the base: 'embedded', a model folder, or a hub id")]
Precision = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="the base's precision")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="sample from the most likely tokens with this total probability")
]
Split = Annotated[str | None, typer.Option(help="the data's split, if it has several")]
Columns = Annotated[str | None, typer.Option(help="your column names: prompt=question,completion=answer")]
AnswerAfter = Annotated[
    str | None, typer.Option(help="for rows of one text: what stands before the answer in each, such as 'A:'")
]
Force = Annotated[bool, typer.Option("--force", help="replace OUT if it exists")]
ModelType = Annotated[
    str | None,
    typer.Option(
        "--model-type",
        help="which diffusion model a file is for, where its names and widths do not tell; 'other' keeps its own names",
    ),
]
DataTemplate = Annotated[Literal["auto", "chat", "plain"], typer.Option(help="how conversations are formatted")]
Turns = Annotated[
    Literal["all", "last"], typer.Option(help="train every answer of a conversation, or only the last one")
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="a file with the chat template (Jinja) to use instead of the model's")
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(metavar="NAME=VALUE,...", help="further variables of the chat template: enable_thinking=false"),
]
Date = Annotated[str | None, typer.Option(help="the date that the chat template writes, YYYY-MM-DD")]


def pairs(text: str | None, what: str) -> dict[str, str]:
    """Parse `a=b,c=d` into a dict. ConfigError naming the option `what` if the text has another form."""
    parts = [part.partition("=") for part in (text or "").split(",") if part]
    if not all(sep for _, sep, _ in parts):
        raise ConfigError(f"{what}: expected NAME=VALUE,... (got '{text}')")
    return {name.strip(): value.strip() for name, _, value in parts}


def template_kwargs(text: str | None) -> dict[str, Any]:
    """Parse --chat-template-kwargs: `a=b,c=d` or {a: b}, with YAML values. Raises ConfigError for anything else."""
    import yaml

    what = "--chat-template-kwargs"
    try:
        if text and text.lstrip().startswith("{"):
            return dict(yaml.safe_load(text))
        return {name: yaml.safe_load(value) for name, value in pairs(text, what).items()}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{what}: expected NAME=VALUE,... (got '{text}')") from error
