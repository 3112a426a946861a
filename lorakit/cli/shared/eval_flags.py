"""Flags of `lorakit eval` as settings of a task: each has an effect on its measures, or is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import Strict
from ...errors import ConfigError
from ...tasks import task_of
from ...tasks.text.lengths import NO_LIMIT


def settings_of(task: str, given: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Return the settings that flags are for a task. `given`: flag -> its setting and value, None if not given.

    Transcripts that are judged end where the model ends them, unless --max-new-tokens says otherwise. Raises
    ConfigError for a flag without an effect on the task's measures.
    """
    names = _judged(task_of(task).settings)
    for flag, (setting, value) in given.items():
        if value is not None and setting not in names:
            raise ConfigError(f"{flag}: it has no effect on what the task {task} is judged by\n  remove {flag}")
    found = {setting: value for setting, value in given.values() if value is not None}
    return {"sample_tokens": NO_LIMIT, **found} if "sample_tokens" in names else found


def _judged(settings: type[Strict]) -> set[str]:
    """Return the settings on which rows and measures depend."""
    parts = [cls for cls in settings.__mro__ if issubclass(cls, Strict)]
    return {name for cls in parts for kind in ("rows", "evaluated") for name in cls.__dict__.get(kind, ())}
