"""Full fine-tuning: all weights, in float32; a model is saved. The yardstick."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..config import Choice, RunSettings, Strict
from ..errors import ConfigError, StateError

if TYPE_CHECKING:
    import torch

FACTOR = 10  # its best learning rate is about a tenth of LoRA's ("LoRA Without Regret", Thinking Machines 2025)


class FullSettings(Strict):
    """Nothing of its own."""


settings = FullSettings
title = "full, float32"
summary = "train all weights in float32 (the yardstick), saved as a model"
result = "model"
keeps_base = False


def precision(config: RunSettings, device: torch.device) -> Choice:
    import torch

    return Choice(torch.float32, "full fine-tuning has no other copy of the weights")


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate / FACTOR, f"a {FACTOR}th of LoRA's rate {why}"


def attach(model: Any, config: RunSettings, name: str, task_type: str) -> None:
    """Nothing is put on it: the base's own weights train as they are. ConfigError where some are quantized."""
    from ..layers.bases import base_of, quantized

    packed = quantized(model)
    if packed:
        name, module = next(iter(packed.items()))
        raise ConfigError(
            f"method: full trains all weights, and {len(packed)} of this base are quantized, such as that of '{name}' "
            f"({base_of(module).quantization})\n"
            "  give the unquantized base, or method: lora"
        )


def activate(model: Any, name: str) -> None:
    """Nothing: there is one model."""


def base_alone(model: Any) -> AbstractContextManager[None]:
    raise StateError(
        "full fine-tuning changes the base itself, so it cannot be had beside the result\n  load the base once more"
    )


def save(model: Any, processor: Any, name: str, folder: Path, metadata: dict[str, Any]) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def trained(config: RunSettings) -> str:
    return "none: full fine-tuning"


def note_together(config: RunSettings) -> str | None:
    return None


def alone(config: RunSettings) -> tuple[str, str] | None:
    return "method: full", (
        "method: full fine-tuning changes the base that a sweep's runs share\n"
        "  start such runs one by one with lorakit train"
    )


def cheaper() -> str | None:
    return "method: lora needs no gradients and optimizer state for the base"


def flags(model: str, result: str) -> str:
    return f"--model {quote(result)}"
