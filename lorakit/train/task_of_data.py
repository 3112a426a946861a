"""Take a run's task from its data where none is given: from the columns of the first row, and from the labels of the
first hundred, which say whether they are classes or measures.

    {"text": "...", "label": "..."}     classification
    {"tokens": [...], "tags": [...]}    token_classification

Each task says which rows it recognizes (`tasks/task.py`). A task that is given always counts, and so does that of the
run that is resumed, or of the adapter that is started from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
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
    rows = list(islice(stream_rows(config.data, config.split, columns), LOOKED_AT))
    values = [renamed(row.values, columns) for row in rows]
    found = recognizing(values[0], values)
    if len(found) > 1:
        choices = " or ".join(f"--task {name} ({task_of(name).summary})" for name in found)
        raise ConfigError(
            f"{rows[0].where}: its columns ({listing(rows[0].values, 20)}) are those of several tasks: "
            f"{', '.join(found)}\n  say which one to train: {choices}"
        )
    return config.replace(task=found[0]) if found else config


LOOKED_AT = 100  # rows by which the task is told

# Settings with which a run's rows are not those of one file of texts.
_OTHER_DATA = ("mix", "slider_positive")


def reason(config: TrainConfig, items: Sequence[Any]) -> str | None:
    """Say which task a run has and why, for the start panel; None for the default. `items`: of its data."""
    if config.task == DEFAULT:
        return None
    found = (getattr(getattr(item, "row", None), "values", None) for item in islice(items, LOOKED_AT))
    rows = [values for values in found if isinstance(values, Mapping)]
    known = [renamed(values, getattr(config, "columns", {})) for values in rows]
    own = bool(known) and recognizing(known[0], known) == [config.task]
    why = f"the rows have {listing(rows[0], 4)}" if own else "as given"
    return f"{config.task}: {task_of(config.task).summary} ({why})"


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row under the names that tasks know. `columns`: a task's name -> the file's."""
    names = {theirs: ours for ours, theirs in columns.items()}
    return {names.get(name, name): value for name, value in row.items()}
