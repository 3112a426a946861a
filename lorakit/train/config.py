"""A run's config: the run's settings and those of every method, in one flat class.

The field texts are the comments of `lorakit init`, the help and the docs at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from ..config import RunSettings, joined
from ..methods import method_names, method_of
from ..plan.units import parse_bytes

METHODS = method_names()

if TYPE_CHECKING:  # the fields of methods are known when the files are looked through
    MethodName = str
    Settings = RunSettings
else:
    MethodName = Literal[tuple(METHODS)]
    Settings = joined("Settings", [RunSettings, *(method_of(name).settings for name in METHODS)])


class TrainConfig(Settings):
    """Everything a training run can be told."""

    method: MethodName = Field("lora", description="; ".join(f"{name}: {method_of(name).summary}" for name in METHODS))

    @model_validator(mode="after")
    def _to_be_found(self) -> TrainConfig:
        if self.find_lr:
            if self.learning_rate != "auto":
                raise ValueError(f"find_lr looks for a learning rate, and {self.learning_rate:g} is given; leave one of the two out")
            alone = method_of(self.method).alone(self)
            if alone:
                raise ValueError(f"find_lr tries adapters side by side on one base, which {alone[0]} does not allow; give a learning_rate")
        return self

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if value not in ("auto", "unchecked"):
            parse_bytes(value)
        return value
