"""Frozen settings objects: unknown keys and wrong values are errors. Classes of settings joined into one config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ..errors import ConfigError, choices, did_you_mean, expectation
from ..module_names import plain
from .peft_names import PEFT_NAMES


@dataclass(frozen=True)
class Choice:
    """A chosen value and the reason for it."""

    value: Any
    reason: str


class Strict(BaseModel):
    """A frozen settings object. ConfigError for unknown keys, with the nearest name, and for invalid values."""

    # Names of a class's own settings: `free` do not affect the result, `rows` determine the training rows, `anew` are
    # chosen anew by a run that starts from an earlier result, `evaluated` affect the measures of an evaluation.
    free: ClassVar[Collection[str]] = ()
    rows: ClassVar[Collection[str]] = ()
    anew: ClassVar[Collection[str]] = ()
    evaluated: ClassVar[Collection[str]] = ()
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    def replace(self, **changes: Any):
        """Return a copy with some fields changed, validated again. Fields that were not given are still not given."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Format a pydantic error as lines of `Class.field: what is wrong (got ...)`, one for each mistake."""
    lines: list[str] = []
    mistakes: dict[tuple[str, str], list[Any]] = {}  # a value that fits no member of a union has an error for each
    for item in error.errors():
        mistakes.setdefault((str(item["loc"][:1]), repr(item.get("input"))), []).append(item)
    for items in mistakes.values():
        item = items[0]
        union = len(items) > 1
        where = ".".join(str(part) for part in (item["loc"][:1] if union else item["loc"])) or "settings"
        if item["type"] == "extra_forbidden":
            ours = PEFT_NAMES.get(where)
            hint = (
                f"; PEFT's '{where}' is '{ours}' here"
                if ours in cls.model_fields
                else did_you_mean(where, cls.model_fields)
            )
            lines.append(f"{cls.__name__} has no setting '{where}'{hint}")
        elif item["type"] == "value_error":
            # A check of several settings names them itself.
            lines.append((f"{cls.__name__}.{where}: " if item["loc"] else "") + str(item["ctx"]["error"]))
        else:
            given = item.get("input")
            hint = did_you_mean(given.lower(), choices(items)) if isinstance(given, str) else ""
            lines.append(f"{cls.__name__}.{where}: {expectation(items)} (got {given!r}){hint}")
    return "\n".join(dict.fromkeys(lines))


_Part = TypeVar("_Part", bound=Strict)


def part(config: Strict, cls: type[_Part]) -> _Part:
    """Return the settings of one class from a config that includes them."""
    return cls(**{name: getattr(config, name) for name in cls.model_fields})


def at_least_one(value: int | str) -> int | str:
    """Validate a setting that is a positive integer or 'auto'. Raises ValueError otherwise."""
    if value != "auto" and (not isinstance(value, int) or value < 1):
        raise ValueError(f"expected a positive integer or 'auto' (got {value})")
    return value


def joined(name: str, parts: Iterable[type[Strict]]) -> type[Strict]:
    """Join settings classes into one. Raises TypeError if two of them define the same setting or validator."""
    parts = tuple(dict.fromkeys(parts))
    owners: dict[str, type] = {}
    for cls in dict.fromkeys(cls for part in parts for cls in part.__mro__ if issubclass(cls, Strict)):
        checks = {
            *cls.__pydantic_decorators__.field_validators,
            *cls.__pydantic_decorators__.model_validators,
        } & cls.__dict__.keys()
        for setting in (cls.model_fields.keys() & inspect.get_annotations(cls).keys()) | checks:
            if setting in owners:
                raise TypeError(
                    f"'{setting}' is a setting of {owners[setting].__name__} and of {cls.__name__}; give one of them "
                    "another name"
                )
            owners[setting] = cls
    return create_model(name, __base__=parts)


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless this is a name ending or a regular expression."""
    if plain(pattern):
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
