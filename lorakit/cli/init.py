"""`lorakit init`: write a config file with every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..tasks import DEFAULT, task_names, task_of
from ..train.config import TrainConfig
from .shared.next import command
from .shared.settings import commented

_SKIP = ("base",)
_HEAD = "# A lorakit training run:  lorakit train --config {name}\n# Commented-out lines show the defaults.\n\n"


def init(
    path: Annotated[Path, typer.Argument(help="the file to write")] = Path("lorakit.yaml"),
    data: Annotated[str, typer.Option(help="your training data")] = "data.jsonl",
    model: Annotated[str, typer.Option(help="the base model")] = "embedded",
    task: Annotated[str, typer.Option(help="the task, such as text_to_image for pictures")] = DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
) -> None:
    """Write a config file with every setting, its default and an explanation."""
    from ..io.atomic import write_text

    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; --force replaces it")
    values = {"model": model, "data": data} | ({} if task == DEFAULT else {"task": task})
    resolved = TrainConfig(**values)  # with the task's own defaults
    text = commented(TrainConfig, values, skip=(*_SKIP, *_of_others(resolved.task)), defaults=resolved)
    write_text(path, _HEAD.format(name=path) + text)
    shown = command("data", "show", data, model=None if model == "embedded" else model)
    print(f"wrote {path}\nnext: {shown}, then {command('train', config=str(path))}")


def _of_others(task: str) -> set[str]:
    """Return the settings that only tasks other than this one have; none for the default task, whose file has all."""
    if task == DEFAULT:
        return set()
    fields = {name: set(task_of(name).settings.model_fields) for name in task_names()}
    return set().union(*fields.values()) - fields[task]
