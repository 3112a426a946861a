"""Refuse settings of other tasks, and settings of every run that a task does not use: they would have no effect."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import RunSettings, Strict
from ...errors import ConfigError
from ...nondefault import nondefault


def check_own(config: RunSettings, settings: type[Strict], unused: Sequence[str]) -> None:
    """Raise ConfigError for a setting that is not the task's own. `settings`: the task's; `unused`: of every run's."""
    from .. import task_names, task_of

    others = [field for name in task_names() for field in task_of(name).settings.model_fields]
    of_others = [name for name in dict.fromkeys(others) if name not in settings.model_fields]
    for name in nondefault(config, [*unused, *of_others]):
        if name == "sample_tokens" and not getattr(config, name):
            continue  # no samples: what a sweep and the search for a learning rate ask of every task
        raise ConfigError(f"{name}: task {getattr(config, 'task', '')} does not have it\n  remove {name}")
