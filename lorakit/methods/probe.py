"""Linear probe: train the task's head alone, on the frozen base's features (Alain and Bengio 2016)."""

from __future__ import annotations

from typing import Any

from ..config import NONE, LoraConfig, RunSettings, Saved, part
from ..errors import ConfigError
from .method import Start, StartData
from .shared.adapter import (  # noqa: F401 (names of the method)
    Earlier,
    activate,
    after_step,
    attach_adapter,
    base_alone,
    cheaper,
    check_result,
    flags,
    keeps_base,
    note_together,
    penalty,
    rate_factors,
    reloaded,
    result,
    save,
    start_from,
)
from .shared.saved import alone, precision  # noqa: F401

FACTOR = 5  # on TREC with the embedded model 2e-2 suits the head alone, and 4e-3 a LoRA with the head


class ProbeSettings(Saved, Earlier):
    pass


settings = ProbeSettings
defaults: dict[str, Any] = {}
title = "linear probe"
summary = "train the task's head alone"


def start(config: RunSettings) -> Start | None:
    return start_from(config, Saved.model_fields, NONE)


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate * FACTOR, f"{FACTOR} times LoRA's rate {why}"


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    from ..bases.pipeline import as_module
    from ..layers.targets import with_head

    fresh = LoraConfig(
        **part(config, Saved).model_dump(), targets=NONE, base=config.model, revision=config.revision, task=task_type
    )
    module = as_module(model)
    if not with_head(module, fresh).save_modules:
        raise ConfigError(
            f"method: probe trains the task's head, and this task ({task_type}) adds none to a "
            f"{type(module).__name__}\n"
            "  use a task with labels, such as task: classification, name the module to train (save_modules), or use "
            "method: lora"
        )
    attach_adapter(model, fresh, config, name, task_type, first)


def trained(config: RunSettings) -> str:
    named = part(config, Saved).save_modules
    return f"{', '.join(named)}, and the task's head" if named else "the task's head"
