"""BitFit: train the biases alone (Ben Zaken et al. 2021)."""

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

# GPT-3's rates for BitFit and LoRA are 1.6e-3 and 2e-4 (Hu et al. 2021, Table 12).
FACTOR = 8


class BitfitSettings(Saved, Earlier):
    pass


settings = BitfitSettings
defaults: dict[str, Any] = {}
title = "BitFit"
summary = "train the biases"


def adapter_config(config: RunSettings, task_type: str) -> LoraConfig:
    """Build the adapter's config from a run's. `task_type`: PEFT's."""
    return LoraConfig(
        **part(config, Saved).model_dump(),
        targets=NONE,
        bias="all",
        base=config.model,
        revision=config.revision,
        task=task_type,
    )


def start(config: RunSettings) -> Start | None:
    return start_from(config, Saved.model_fields, NONE)


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate * FACTOR, f"{FACTOR} times LoRA's rate {why}"


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    fresh = adapter_config(config, task_type)
    _check_biases(model, fresh)
    attach_adapter(model, fresh, config, name, task_type, first)


def _check_biases(model: Any, fresh: LoraConfig) -> None:
    """Raise ConfigError if the base has no biases but those of modules that are trained in full anyway."""
    from ..bases.pipeline import as_module
    from ..layers.targets import with_head
    from .shared.saved import ending_in

    module = as_module(model)
    in_full = ending_in(module, with_head(module, fresh).save_modules)
    biases = [name for name, _ in module.named_parameters() if name.rpartition(".")[2] == "bias"]
    if all(any(name.startswith(f"{m}.") for m in in_full) for name in biases):
        raise ConfigError(
            f"method: bitfit trains biases, and this {type(module).__name__} has none\n"
            "  use method: layernorm, which trains the norms, or method: lora"
        )


def trained(config: RunSettings) -> str:
    return "biases"
