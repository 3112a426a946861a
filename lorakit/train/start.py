"""Start a run from an earlier result: the settings that the result fixes, and an error for those it contradicts.

    lorakit train --adapter runs/first --data more.jsonl --out runs/second

The new run has the earlier one's parameters as its first values, and its own data, optimizer and schedule.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..methods import method_of
from ..tasks import task_of, task_of_adapter
from .config import TrainConfig

# Settings that a run may choose anew, whatever the result that it starts from was trained with.
ANEW = {name for cls in TrainConfig.__mro__ for name in cls.__dict__.get("anew", ())}


def resolved(config: TrainConfig) -> TrainConfig:
    """Return the config with the settings that the result it starts from fixes; the config itself if it starts anew.

    Model and task are the earlier run's too unless given. Raises ConfigError, listing them, for settings that were
    given and contradict the result; LorakitError if the result cannot be read.
    """
    start = method_of(config.method).start(config)
    if start is None:
        return config
    changes: dict[str, Any] = {}
    given = config.model_fields_set
    if "model" not in given and start.base is not None:
        changes |= {"model": start.base, "revision": start.revision}
    fixed = dict(start.settings)
    task = task_of_adapter(start.task, start.metadata)
    if task is not None:
        task = _task_to_go_on(config, task, config.replace(**changes), start.about)
        fixed["task"] = task
    elif start.task is not None and "task" not in given:
        raise ConfigError(
            f"{start.source}: its task is {start.task}, which lorakit does not train\n"
            "  give the task to go on with (--task)"
        )
    fixed |= _of_task(config.replace(**changes), task or config.task, start.about)
    lines = []
    for name, value in fixed.items():
        mine = getattr(config, name)
        if name not in given or mine == value or (name in start.spellings and mine == start.spellings[name]):
            changes[name] = value
        elif name in ANEW:
            continue
        else:
            lines.append(f"  {name}: the adapter has {value!r}, given is {mine!r}")
    if lines:
        raise ConfigError(
            f"the run starts from the adapter {start.source}, which contradicts settings that were given:\n"
            + "\n".join(lines)
            + "\n  omit these settings, or omit adapter to start a new one"
        )
    return config.replace(**changes)


def _task_to_go_on(config: TrainConfig, task: str, based: TrainConfig, about: Any) -> str:
    """Return the task to go on with: the result's, or another one that was given and can go on with it.

    That is one of the same PEFT type, where the result has nothing that belongs to its own task, such as labels: so
    preferences can follow supervised training. `based`: the config with the result's base.
    """
    other = config.task
    if "task" not in config.model_fields_set or task_of(other).peft_type != task_of(task).peft_type:
        return task
    return task if _of_task(based, task, about).keys() - ANEW else other


def _of_task(config: TrainConfig, task: str, about: Any) -> dict[str, Any]:
    """Return the task's settings that belong to the result, such as the names of its labels."""
    if not about:
        return {}
    return task_of(task).remembered(about, task_of(task).blueprint(config))
