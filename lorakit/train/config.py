"""A run's config: the run's settings, those of every task and those of every method, in one flat class.

The field texts are the comments of `lorakit init`, the help and the docs at once.
"""

from __future__ import annotations

# ClassVar: pydantic 2.9 resolves the annotations of joined settings in this module.
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias  # noqa: F401

from pydantic import Field, field_validator, model_validator

from ..config import RunSettings, Source, Strict, joined
from ..methods import method_names, method_of
from ..plan.units import parse_bytes
from ..tasks import DEFAULT, task_for, task_names, task_of

METHODS, TASKS = method_names(), task_names()

# which methods and tasks there are, and their settings, is known when their folders are looked through
if TYPE_CHECKING:
    MethodName: TypeAlias = str
    TaskName: TypeAlias = str
    Settings = RunSettings
else:
    MethodName, TaskName = Literal[tuple(METHODS)], Literal[tuple(TASKS)]
    # From the last to the first, as `lorakit init` lists them and sweeps name their runs: the tasks' stand between the
    # two halves of the run's.
    _of_tasks = joined("TaskSettings", (task_of(name).settings for name in TASKS)).__mro__[1:]
    _between = [cls for cls in _of_tasks if issubclass(cls, Strict) and cls is not Strict]
    Settings = joined("Settings", [RunSettings, *_between, Source, *(method_of(name).settings for name in METHODS)])


class TrainConfig(Settings):
    """Everything a training run can be told."""

    task: TaskName = Field(
        "causal_lm",
        description="what is to be learnt: "
        + "; ".join(f"{name} (PEFT's {task_of(name).peft_type}): {task_of(name).summary}" for name in TASKS),
    )
    method: MethodName = Field("lora", description="; ".join(f"{name}: {method_of(name).summary}" for name in METHODS))

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, value: Any) -> Any:
        return DEFAULT if value is None else task_for(value) or value

    @model_validator(mode="after")
    def _to_be_found(self) -> TrainConfig:
        if self.find_lr:
            if self.learning_rate != "auto":
                raise ValueError(
                    f"find_lr looks for a learning rate, and {self.learning_rate:g} is given; leave one of the two out"
                )
            alone = method_of(self.method).alone(self)
            what = alone[0] if alone else f"task: {self.task}" if task_of(self.task).alone(self) else None
            if what:
                raise ValueError(
                    f"find_lr tries adapters side by side on one base, which {what} does not allow; give a "
                    "learning_rate"
                )
        return self

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if value not in ("auto", "unchecked"):
            parse_bytes(value)
        return value
