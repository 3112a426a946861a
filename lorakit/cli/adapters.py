"""`lorakit inspect` and `lorakit merge`: adapters as files."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer


def inspect(
    source: Annotated[str, typer.Argument(help="an adapter (folder, file or hub id), or a model folder with --modules")],
    alpha: Annotated[float | None, typer.Option(help="for loralib files, which do not hold it")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="list every module (of a model: those that can be adapted)")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """What is in an adapter: base, targets, ranks, strength, norms of its update; or which modules a model has."""
    from ..inspect import describe_adapter, describe_model, is_model

    if is_model(source):
        told: Any = describe_model(source)
    else:
        from ..formats import load

        options: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
        told = describe_adapter(load(source, **options), source)
    if json_output:
        print(json.dumps(told.to_dict()))
    else:
        told.show(modules)


def merge(
    base: Annotated[str, typer.Argument(help="the base's checkpoint folder, or 'embedded'")],
    adapter: Annotated[str, typer.Argument(help="the adapter")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="precision of the merged weights; default: the base's")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="give a tied LM head a weight of its own")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="merge although the adapter was trained on another base")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Merge an adapter into a checkpoint's files, one tensor in memory at a time, and check the result by reading it again."""
    import torch
    from rich.console import Console

    from ..checkpoint import merge_checkpoint
    from ..models.base import model_path

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    console = Console()
    with console.status("merging") as status:
        report = merge_checkpoint(
            model_path(base), adapter, out, force=force, dtype=kinds[dtype] if dtype else None, untie=untie, force_base=force_base,
            on_tensor=lambda name, done, total: status.update(f"{done}/{total} {name}"),
        )  # fmt: skip
    if json_output:
        print(json.dumps(report.to_dict()))
        return
    console.print(report.table())
    print(f"next: lorakit generate 'Once upon a time' --model {quote(str(out))}")
