"""`lorakit image train`: train an adapter on pictures. The same as `lorakit train --task text_to_image`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import ConfigError
from ...tasks import task_names, task_of
from ...train.config import TrainConfig
from ..shared.settings import read_config, with_flags
from ..train import start

TASK = "text_to_image"
_OTHERS = {name for task in task_names() if task != TASK for name in task_of(task).settings.model_fields}
# Settings that this task does not have, or that the command gives itself.
_SKIP = (
    "base",
    "task",
    "data",
    "method",
    "adapter",
    "add_tokens",
    "compile",
    "trust_remote_code",
    "trainable_tokens",
    "quantize",
    "double",
    "compute_dtype",
    *(_OTHERS - set(task_of(TASK).settings.model_fields)),
)


def _train(
    flags: dict[str, Any],
    data: Annotated[
        str | None, typer.Argument(help="pictures with captions: a folder, a metadata file, or a hub id")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="a YAML file (lorakit init --task text_to_image writes one)")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only the last line")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Train an adapter on pictures with captions. Started again on its own folder, a run resumes where it stopped."""
    values = (read_config(config) if config else {}) | flags | {"task": TASK} | ({"data": data} if data else {})
    if values.get("slider_positive"):
        values.setdefault("data", "none")
    if "data" not in values:
        raise ConfigError("no pictures\n  give their folder, or a --config that names it (data: FOLDER)")
    start(values, quiet, json_output)


train = with_flags(TrainConfig, _train, skip=_SKIP)
train.__name__ = "train"
