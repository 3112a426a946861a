"""The date that a chat template writes: as given, or the day on which the run began."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date as Date
from typing import Any

from ...config import RunSettings


def dated(config: RunSettings, tokenizer: Any, earlier: Mapping[str, Any]) -> RunSettings:
    """Return the config with the date that its chat template writes; the config itself if the template writes none.

    `earlier`: the settings of the run that is resumed, which has a date already; empty for a new run.
    """
    from ...data.templates import read_template, reads_date, with_template

    path = getattr(config, "chat_template", None)
    if getattr(config, "date", None) is not None:
        return config
    if not reads_date(tokenizer if path is None else with_template(tokenizer, read_template(path), path)):
        return config
    date = earlier.get("date")
    resolved: RunSettings = config.replace(date=Date.today().isoformat() if date is None else str(date))
    return resolved
