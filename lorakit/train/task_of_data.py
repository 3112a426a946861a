"""Take a run's task from its data where none is given: from the columns of the first row.

    {"text": "...", "label": "..."}     classification
    {"tokens": [...], "tags": [...]}    token_classification

Each task says which rows it recognizes (`tasks/task.py`). A task that is given always counts, and so does that of the
run that is resumed, or of the adapter that is started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, listing
from ..methods import method_of
from ..tasks import DEFAULT, recognizing, task_of
from .config import TrainConfig
from .run_folder import RunFolder


def with_task(config: TrainConfig) -> TrainConfig:
    """Return the config with the task of its data; the config itself if the task is given, or no task recognizes the
    rows.

    Raises ConfigError if several tasks recognize them, DataError if the first row cannot be read.
    """
    if "task" in config.model_fields_set:
        return config
    earlier = RunFolder(config.out).earlier()
    if earlier:
        return config.replace(task=earlier.get("task", DEFAULT))
    if method_of(config.method).start(config) is not None or any(getattr(config, name) for name in _OTHER_DATA):
        return config
    from ..data.pictures.find import is_pictures
    from ..data.read import stream_rows

    if Path(config.data).expanduser().is_dir() and is_pictures(config.data, config.split):
        raise ConfigError(
            f"{config.data} is a folder of pictures; say what is to be learnt from it\n"
            "  --task image_classification: the folders' names are the labels\n"
            "  lorakit image train FOLDER: to draw such pictures for their captions"
        )
    columns = getattr(config, "columns", {})
    row = next(stream_rows(config.data, config.split, columns))
    found = recognizing(renamed(row.values, columns))
    if len(found) > 1:
        raise ConfigError(
            f"{row.where}: its columns ({listing(row.values, 20)}) are those of several tasks: {', '.join(found)}\n"
            f"  say which one to train: --task {found[0]}"
        )
    return config.replace(task=found[0]) if found else config


# Settings with which a run's rows are not those of one file of texts.
_OTHER_DATA = ("mix", "slider_positive")


def reason(config: TrainConfig, row: Any) -> str | None:
    """Say which task a run has and why, for the start panel; None for the default. `row`: one of its rows, or None."""
    if config.task == DEFAULT:
        return None
    values = getattr(row, "values", None)
    names = listing(values, 4) if isinstance(values, Mapping) else ""
    own = isinstance(values, Mapping) and config.task in recognizing(renamed(values, getattr(config, "columns", {})))
    why = f"the rows have {names}" if own else "as given"
    return f"{config.task}: {task_of(config.task).summary} ({why})"


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row under the names that tasks know. `columns`: a task's name -> the file's."""
    names = {theirs: ours for ours, theirs in columns.items()}
    return {names.get(name, name): value for name, value in row.items()}
