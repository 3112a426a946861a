"""Take a sweep's task from its data where none is given, as `train/task_of_data.py` does for one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...tasks import DEFAULT
from ..config import TrainConfig
from ..run_folder import RunFolder
from ..task_of_data import with_task
from .sweep_config import MAX_RUNS, Sweep, expand


def for_data(plan: Sweep, values: Mapping[str, Any], max_runs: int = MAX_RUNS) -> Sweep:
    """Return the sweep with the task of its data; the sweep itself if the task is given or none recognizes the rows.

    `values`: the settings that the sweep was expanded from. A sweep that is resumed keeps its task. Raises ConfigError
    for data of several tasks, or of a task whose runs do not train together; DataError if a first row cannot be read.
    """
    if "task" in values:
        return plan
    found: dict[str, TrainConfig] = {}  # by data, which is read once
    for config in sorted(plan.runs.values(), key=lambda each: not RunFolder(each.out).earlier()):  # resumed runs first
        rows = repr([getattr(config, name, None) for name in _ROWS])
        if rows not in found:
            found[rows] = with_task(config)
    first = next(iter(found.values()))
    other = next((config for config in found.values() if config.task != first.task), None)
    if other is not None:
        raise ConfigError(
            f"{first.data} has rows for the task {first.task}, {other.data} for {other.task}, and all runs of a sweep "
            f"train one task\n  start a sweep for each, or give the task (--task {DEFAULT})"
        )
    if first.task == DEFAULT:
        return plan
    try:
        return expand({**values, "task": first.task}, max_runs)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\n  the task is that of the rows of {first.data}; --task {DEFAULT} trains on their texts alone"
        ) from error


_ROWS = ("data", "split", "columns", "mix", "method", "adapter")  # the settings that a run's task follows from
