"""Options that several verbs share, so that they read and mean the same in each."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Option(help="the base: 'embedded', a model folder, or a hub id")]
Precision = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="the base's precision")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="sample from the likeliest tokens that have this probability together")]
Split = Annotated[str | None, typer.Option(help="the data's split, where it has several")]
Columns = Annotated[str | None, typer.Option(help="your column names: prompt=question,completion=answer")]
DataTemplate = Annotated[Literal["auto", "chat", "plain"], typer.Option(help="how conversations are written")]
