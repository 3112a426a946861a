"""Options shared by several commands, so that they read and mean the same in each."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ...errors import ConfigError

Model = Annotated[str, typer.Option(help="the base: 'embedded', a model folder, or a hub id")]
Precision = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="the base's precision")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="sample from the most likely tokens with this total probability")
]
Split = Annotated[str | None, typer.Option(help="the data's split, if it has several")]
Columns = Annotated[str | None, typer.Option(help="your column names: prompt=question,completion=answer")]
Force = Annotated[bool, typer.Option("--force", help="replace OUT if it exists")]
ModelType = Annotated[
    str | None,
    typer.Option(
        "--model-type",
        help="which diffusion model a file is for, where its names and widths do not tell; 'other' keeps its own names",
    ),
]
DataTemplate = Annotated[Literal["auto", "chat", "plain"], typer.Option(help="how conversations are formatted")]


def pairs(text: str | None, what: str) -> dict[str, str]:
    """Parse `a=b,c=d` into a dict. ConfigError naming the option `what` if the text has another form."""
    parts = [part.partition("=") for part in (text or "").split(",") if part]
    if not all(sep for _, sep, _ in parts):
        raise ConfigError(f"{what}: expected NAME=VALUE,... (got '{text}')")
    return {name.strip(): value.strip() for name, _, value in parts}
