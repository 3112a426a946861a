"""Options shared by `lorakit card` and `lorakit push`."""

from __future__ import annotations

from typing import Annotated

import typer

License = Annotated[
    str | None,
    typer.Option("--license", "--licence", help="the license id on the hub: apache-2.0, mit, cc-by-4.0, ..."),
]
BaseModel = Annotated[str | None, typer.Option(help="the base's hub id, if the adapter names a local folder")]
Alpha = Annotated[float | None, typer.Option(help="for files that do not store it (loralib, old MLX)")]
Base = Annotated[str | None, typer.Option(help="the base's folder, required to read a GGUF of a Llama")]
Json = Annotated[bool, typer.Option("--json", help="print as JSON")]
