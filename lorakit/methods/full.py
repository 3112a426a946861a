"""Full fine-tuning: train all weights in float32 and save a model. The baseline that LoRA is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..config import Choice, RunSettings
from ..errors import ConfigError, StateError
from .shared.adapter import Earlier

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .method import StartData

FACTOR = 10  # its best learning rate is about a tenth of LoRA's ("LoRA Without Regret", Thinking Machines 2025)


class FullSettings(Earlier):
    """Full fine-tuning has no settings of its own. An adapter to start from is refused with what to do instead."""


settings = FullSettings
defaults: dict[str, Any] = {}
title = "full, float32"
summary = "train all weights in float32 (the baseline) and save a model"
result = "model"
keeps_base = False


def start(config: RunSettings) -> None:
    """Return None. Raises ConfigError if an adapter is given, which full fine-tuning cannot go on from, and for a base
    that is to be quantized.
    """
    if config.quantize is not None:
        raise ConfigError(
            f"quantize: {config.quantize}: method: full trains all weights, and quantized ones cannot be trained\n"
            "  omit quantize, or use method: lora"
        )
    if (adapter := getattr(config, "adapter", None)) is not None:
        raise ConfigError(
            f"adapter: {adapter}: method: full trains the base's own weights, not an adapter\n"
            "  merge it into the base first (lorakit merge), and train the result; or use method: lora"
        )


def precision(config: RunSettings, device: torch.device) -> Choice:
    import torch

    return Choice(torch.float32, "full fine-tuning keeps no other copy of the weights")


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate / FACTOR, f"a {FACTOR}th of LoRA's rate {why}"


def attach(model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None) -> None:
    """Do nothing: the base's own weights are trained. Raises ConfigError if some of them are quantized."""
    from ..layers.bases import base_of, quantized

    packed = quantized(model)
    if packed:
        name, module = next(iter(packed.items()))
        raise ConfigError(
            f"method: full trains all weights, and {len(packed)} of this base are quantized, such as that of '{name}' "
            f"({base_of(module).quantization})\n"
            "  load the unquantized base, or use method: lora"
        )


def check_result(model: Any, config: RunSettings, name: str, unsaved: Callable[[Any], str | None]) -> None:
    """Do nothing: a model is saved as it was loaded."""


def rate_factors(model: Any, config: RunSettings, name: str) -> Mapping[nn.Parameter, tuple[str, float]]:
    return {}


def penalty(model: Any, name: str) -> Tensor | None:
    return None


def after_step(model: Any, name: str, step: int, steps: int) -> None:
    """Do nothing: nothing is adjusted."""


def activate(model: Any, name: str) -> None:
    """Do nothing: there is only one model."""


def base_alone(model: Any) -> AbstractContextManager[None]:
    raise StateError("full fine-tuning changes the base itself, so the base is no longer available\n  load it again")


def reloaded(model: Any, folder: Path) -> AbstractContextManager[None]:
    raise StateError("full fine-tuning saves a model of its own\n  load it instead of the base")


def save(
    model: Any,
    processor: Any,
    name: str,
    folder: Path,
    metadata: dict[str, Any],
    write: Callable[[Any, Path], None] | None = None,
) -> None:
    from ..io.staging import staged

    with staged(folder) as path:
        model.save_pretrained(path)
        processor.save_pretrained(path)


def trained(config: RunSettings) -> str:
    return "none: full fine-tuning"


def note_together(config: RunSettings) -> str | None:
    return None


def alone(config: RunSettings) -> tuple[str, str] | None:
    return "method: full", (
        "method: full fine-tuning changes the base that a sweep's runs share\n"
        "  start these runs one by one with lorakit train"
    )


def cheaper() -> str | None:
    return "method: lora needs no gradients and optimizer state for the base"


def flags(model: str, result: str) -> str:
    return f"--model {quote(result)}"
