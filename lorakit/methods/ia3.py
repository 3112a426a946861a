"""(IA)³: learn a factor for each key, value and inner activation of the feed-forwards (Liu et al. 2022)."""

from __future__ import annotations

from typing import Any

from ..config import LoraConfig, Placement, RunSettings, part
from ..config.ia3 import Ia3Settings
from .method import Start, StartData
from .shared.adapter import (  # noqa: F401 (names of the method)
    Earlier,
    activate,
    after_step,
    alone,
    attach_adapter,
    base_alone,
    cheaper,
    check_result,
    flags,
    keeps_base,
    note_together,
    penalty,
    precision,
    rate_factors,
    reloaded,
    result,
    save,
    start_from,
)

# On the embedded model, after 40 steps of 8 rows of E2E, the held-out loss is 2.58 at 10 times LoRA's rate, 2.34 at 20
# times and 2.15 at 40 times it. PEFT's example (8e-3, width 1,024) has 10 times, the paper (3e-3) less: for many steps.
FACTOR = 20


class Ia3RunSettings(Placement, Ia3Settings, Earlier):
    pass


settings = Ia3RunSettings
defaults: dict[str, Any] = {"targets": "ia3"}
title = "(IA)³"
summary = "train factors of keys, values and inner activations"
_KIND = "ia3"


def adapter_config(config: RunSettings, task_type: str) -> LoraConfig:
    """Build the adapter's config from a run's. `task_type`: PEFT's."""
    own = part(config, Placement).model_dump() | part(config, Ia3Settings).model_dump()
    return LoraConfig(**own, variant=_KIND, base=config.model, revision=config.revision, task=task_type)


def start(config: RunSettings) -> Start | None:
    return start_from(config, {*Placement.model_fields, *Ia3Settings.model_fields}, _KIND)


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate * FACTOR, f"{FACTOR} times LoRA's rate {why}"


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    attach_adapter(model, adapter_config(config, task_type), config, name, task_type, first)


def trained(config: RunSettings) -> str:
    named = part(config, Placement).targets
    return f"factors of {named if isinstance(named, str) else ', '.join(named)}"
