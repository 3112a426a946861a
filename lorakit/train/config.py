"""A training run's config: the settings of the run, of every task and of every method, in one flat class.

The field descriptions serve as the comments of `lorakit init`, as the help and as the docs.
"""

from __future__ import annotations

from collections.abc import Mapping

# ClassVar: pydantic 2.9 resolves the annotations of joined settings in this module.
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias  # noqa: F401

from pydantic import Field, field_validator, model_validator

from ..config import RunSettings, Source, Strict, joined
from ..config.short_names import spelled_out
from ..methods import method_names, method_of
from ..plan.units import parse_bytes
from ..tasks import DEFAULT, task_for, task_names, task_of

METHODS, TASKS = method_names(), task_names()

# Methods and tasks, and so the config's fields, are found at run time by listing their folders.
if TYPE_CHECKING:
    MethodName: TypeAlias = str
    TaskName: TypeAlias = str
    Settings = RunSettings
else:
    MethodName, TaskName = Literal[tuple(METHODS)], Literal[tuple(TASKS)]
    # Fields are ordered from the last base class to the first. That is the order of `lorakit init` and of the names of
    # a sweep's runs: the tasks' settings stand between the two halves of the run's.
    _of_tasks = joined("TaskSettings", (task_of(name).settings for name in TASKS)).__mro__[1:]
    _between = [cls for cls in _of_tasks if issubclass(cls, Strict) and cls is not Strict]
    Settings = joined("Settings", [RunSettings, *_between, Source, *(method_of(name).settings for name in METHODS)])


# Settings of every run, whatever its method and task.
_OF_RUNS = {*RunSettings.model_fields, "ema", "keep_best"}


def owners(setting: str) -> tuple[list[str], list[str]]:
    """Return the methods and the tasks that have a setting; nothing for one of every run."""
    if setting in _OF_RUNS:
        return [], []
    methods = [name for name in METHODS if setting in method_of(name).settings.model_fields]
    return methods, [name for name in TASKS if setting in task_of(name).settings.model_fields]


def belongs(setting: str, method: str, task: str) -> bool:
    """Whether a setting has an effect on runs of this method and task."""
    methods, tasks = owners(setting)
    return not (methods or tasks) or method in methods or task in tasks


def home(setting: str) -> dict[str, str]:
    """Return a method or a task with which the setting belongs to a run; empty if it does by default."""
    methods, tasks = owners(setting)
    if belongs(setting, METHODS[0], TASKS[0]):
        return {}
    return {"method": methods[0]} if methods else {"task": tasks[0]}


def task_named(value: Any) -> Any:
    """Return the task's name: as given, with hyphens, or as PEFT calls it; the default for None."""
    if not isinstance(value, str):
        return DEFAULT if value is None else value
    return task_for(value) or value.replace("-", "_")


class TrainConfig(Settings):
    """All settings of a training run. Raises ConfigError for unknown names and invalid values."""

    task: TaskName = Field(
        "causal_lm",
        description="the task: "
        + "; ".join(f"{name} (PEFT's {task_of(name).peft_type}): {task_of(name).summary}" for name in TASKS),
    )
    method: MethodName = Field("lora", description="; ".join(f"{name}: {method_of(name).summary}" for name in METHODS))
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the trained parameters (such as 0.99), which evaluation, samples and "
        "the result use; 0: none",
    )
    keep_best: bool = Field(
        True, description="the result has the parameters of the best held-out loss; false: those of the last step"
    )

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

    @model_validator(mode="wrap")
    @classmethod
    def _defaults_of_task(cls, values: Any, handler: Any) -> Any:
        """Give settings that are not given the task's and the method's own default; they still count as not given."""
        if not isinstance(values, dict):
            return handler(values)
        values = spelled_out(values)  # what a short name stands for counts as given
        name = task_named(values.get("task"))
        method = values.get("method", METHODS[0])
        own = dict(task_of(name).defaults(values)) if name in TASKS else {}
        own |= method_of(method).defaults if method in METHODS else {}
        config = handler(own | values)
        config.model_fields_set.intersection_update(values)
        _check_owners(config, own)
        return config

    def by_method(self, method: str) -> TrainConfig:
        """Return the same run by another method, without the settings that it does not have."""
        kept = {name: getattr(self, name) for name in self.model_fields_set if belongs(name, method, self.task)}
        return type(self)(**kept | {"method": method})

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, value: Any) -> Any:
        return task_named(value)

    @model_validator(mode="after")
    def _find_lr_allowed(self) -> TrainConfig:
        if self.find_lr:
            if self.learning_rate != "auto":
                raise ValueError(
                    f"find_lr searches for a learning rate, but learning_rate is {self.learning_rate:g}; give only one "
                    "of the two"
                )
            alone = method_of(self.method).alone(self)
            setting = alone[0] if alone else f"task: {self.task}" if task_of(self.task).alone(self) else None
            if setting:
                raise ValueError(
                    f"find_lr trains several adapters on one base, which {setting} does not allow; give a learning_rate"
                )
        return self

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if value not in ("auto", "unchecked"):
            parse_bytes(value)
        return value


def _check_owners(config: TrainConfig, defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for settings that were given, have another value than the default, and belong to other methods
    or tasks. `defaults`: those of the method and the task.
    """
    wrong = []
    for name in config.model_fields_set:
        default = defaults.get(name, type(config).model_fields[name].get_default(call_default_factory=True))
        value = getattr(config, name)
        if not value or value == default or belongs(name, config.method, config.task):
            continue  # none of something, such as no samples, is what a run has that does not know it
        methods, tasks = owners(name)
        kind, mine, having = ("method", config.method, methods) if methods else ("task", config.task, tasks)
        remove = "remove it" if kind in config.model_fields_set else f"remove it, or give --{kind} {having[0]}"
        wrong.append(f"{name} has no effect with {kind}: {mine}; {remove} (it is for {kind}: {', '.join(having)})")
    if wrong:
        raise ValueError("\n".join(sorted(wrong)))
