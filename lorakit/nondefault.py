"""Which settings differ from their defaults, for checks of settings that would have no effect."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel


def nondefault(config: BaseModel, names: Iterable[str]) -> list[str]:
    """Return those of a config's settings whose values are not the defaults of their fields.

    Values are compared, and not what was given, since a run's folder keeps all settings, the defaults too.
    """
    fields = type(config).model_fields
    return [name for name in names if getattr(config, name) != fields[name].get_default(call_default_factory=True)]
