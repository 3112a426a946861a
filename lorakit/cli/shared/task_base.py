"""A base with adapters, for their task: with the settings, label names, tokens and template that their records have.

    name = task_named(requested, values, model)
    config = config_for(name, values, data=..., model=..., ...)
    processor = processor_for(config, values)
    base = base_for(config, processor, about_of(config, values), values)

A command that has rows gives them in place of `about_of`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ...config import Quantization
from ...errors import ConfigError
from ...tasks import DEFAULT, task_of, task_of_adapter
from ...tasks.text.lengths import NO_LIMIT
from ...train.config import TrainConfig
from ...train.config import task_named as canonical

if TYPE_CHECKING:
    from ...adapter.adapter import Adapter
    from ...tasks.task import Base, Data


def task_named(requested: str | None, values: Mapping[str, Adapter], model: str) -> str:
    """Return the requested task, or the one the adapters were trained for; without adapters, the one that generates
    text with this model. ConfigError if the adapters' tasks are several.
    """
    from ...bases.load import load_config
    from ...tasks.text.kind import writes_from_source

    tasks = {task_of_adapter(value.config.task, value.metadata) or DEFAULT for value in values.values()}
    if requested is not None:
        name: str = canonical(requested)
        return name
    if len(tasks) > 1:
        raise ConfigError(
            f"the adapters are for different tasks: {', '.join(sorted(tasks))}\n  evaluate one task at a time"
        )
    if not tasks and writes_from_source(load_config(model)):
        return "seq2seq"
    return next(iter(tasks), DEFAULT)


def config_for(
    name: str,
    values: Mapping[str, Adapter],
    *,
    data: str,
    model: str,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    precision: str = "auto",
    quantization: Quantization | None = None,
    **given: Any,
) -> TrainConfig:
    """Return a run's config for this task, with what the adapters' records remember; without adapters, the model's.

    given: further settings, of which None is not given. Raises ConfigError for adapters that were trained with
    different settings.
    """
    from ...bases.rope import recorded
    from ...bases.vocabulary import recorded_tokens
    from ...tasks.text.positions import config_tokens, positions_for

    config = TrainConfig(
        data=data,
        split=split,
        model=model,
        columns=dict(columns or {}),
        task=name,
        precision=precision,
        validation=0,
        **(quantization or Quantization()).model_dump(),
    )
    task = task_of(config.task)
    scaling = recorded(value.metadata for value in values.values())
    if scaling is not None and "rope_scaling" in task.settings.model_fields:
        config = config.replace(rope_scaling=scaling)  # first, as it decides how long rows may be
    base_config = task.blueprint(config)
    settings: list[dict[str, Any]] = [
        task.remembered(v.metadata.get("data") or {}, base_config) for v in values.values()
    ]
    if any(each != settings[0] for each in settings):
        raise ConfigError(
            f"the adapters were trained with different settings of {name}: {settings}\n  evaluate them one at a time"
        )
    changes: dict[str, Any] = {}
    if limits := {"max_length", "max_target_length"} & task.settings.model_fields.keys():
        virtual = max((config_tokens(value.config) for value in values.values()), default=0)
        changes |= dict.fromkeys(limits, positions_for(config, base_config, virtual) or NO_LIMIT)
    if "on_long" in task.settings.model_fields:
        changes["on_long"] = "cut"  # nothing is trained on what is missing
    changes |= settings[0] if settings else task.remembered({}, base_config)
    for value in values.values():
        if added := recorded_tokens(value.metadata):
            changes["add_tokens"] = sorted(added, key=lambda token: added[token])
    changes |= _conversations(task.settings.model_fields, values)
    return config.replace(**changes | {setting: value for setting, value in given.items() if value is not None})


def _conversations(fields: Collection[str], values: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return how conversations were written in the last adapter's training, for a task with these settings."""
    from ...data.chat_record import ChatRecord

    if "template" not in fields or not values:
        return {}
    record = ChatRecord.of([*values.values()][-1].metadata)
    style = {} if record.style in (None, "none") else {"template": record.style}
    return {**style, "chat_template_kwargs": dict(record.options.kwargs), "date": record.options.date}


def processor_for(config: TrainConfig, values: Mapping[str, Adapter]) -> Any:
    """Load the task's processor, with the chat template that the last adapter's record has."""
    from ...data.chat_record import ChatRecord
    from ...data.templates import with_template

    processor = task_of(config.task).processor(config)
    records = [ChatRecord.of(value.metadata) for value in values.values()]
    template = records[-1].template if records else None
    return processor if template is None else with_template(processor, template, "the adapter's chat template")


def about_of(config: TrainConfig, values: Mapping[str, Adapter]) -> Data:
    """Return what the record of the adapters' data says, without rows; without adapters, what the config remembers."""
    from ...tasks.task import Data

    task = task_of(config.task)
    recorded = next((value.metadata.get("data") for value in values.values()), None)
    about = dict(recorded) if isinstance(recorded, Mapping) else {}
    return Data([], [], "", [], {**task.remembered({}, task.blueprint(config)), **about})


def base_for(config: TrainConfig, processor: Any, data: Data, values: Mapping[str, Adapter]) -> Base:
    """Load the base and attach the adapters, by their names. Raises LorakitError if one does not fit."""
    from ...bases.device import choose_device, choose_dtype
    from ...model.attach import attach
    from ...tasks.task import Base

    device = choose_device().value
    dtype = choose_dtype(config.precision, device).value
    base = Base(task_of(config.task).load(config, processor, data, dtype, device), processor, config)
    for name, value in values.items():
        attach(base.model, value, name)
    return base
