"""LoRA: train low-rank updates of frozen weights and save an adapter (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..config import Choice, LoraConfig, LoraSettings, RunSettings, part

if TYPE_CHECKING:
    import torch

settings = LoraSettings
title = "LoRA"
summary = "train an adapter"
result = "adapter"
keeps_base = True


def adapter_config(config: RunSettings, task_type: str) -> LoraConfig:
    """Build the adapter's config from a run's. `task_type`: PEFT's."""
    return LoraConfig(
        **part(config, LoraSettings).model_dump(), base=config.model, revision=config.revision, task=task_type
    )


def precision(config: RunSettings, device: torch.device) -> Choice:
    from ..bases.device import choose_dtype

    return choose_dtype(config.precision, device)


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate, why


def attach(model: Any, config: RunSettings, name: str, task_type: str) -> None:
    from ..model.attach import attach

    attach(model, adapter_config(config, task_type), name)


def activate(model: Any, name: str) -> None:
    from ..model.activate import activate

    activate(model, name)


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    from ..model.activate import activate, active

    before = active(model)
    activate(model, None)
    try:
        yield
    finally:
        activate(model, before)


def save(model: Any, processor: Any, name: str, folder: Path, metadata: dict[str, Any]) -> None:
    from ..model.capture import capture

    adapter = capture(model, name)
    replace(adapter, metadata={**adapter.metadata, **metadata}).save(folder)


def trained(config: RunSettings) -> str:
    own = part(config, LoraSettings)
    return f"rank {own.rank}, alpha {own.alpha:g}"


def note_together(config: RunSettings) -> str | None:
    return (
        "dropout masks depend on the sweep; the same run alone would draw different ones"
        if part(config, LoraSettings).dropout
        else None
    )


def alone(config: RunSettings) -> tuple[str, str] | None:
    for name, empty in (("save_modules", []), ("bias", "none")):
        value = getattr(config, name)
        if value != empty:
            return name, (
                f"{name}: {value}: trained copies of base weights apply to every row, so runs cannot share a forward "
                "pass\n"
                f"  omit {name}, or start these runs one by one with lorakit train"
            )
    return None


def cheaper() -> str | None:
    return None


def flags(model: str, result: str) -> str:
    return f"--model {quote(model)} --adapter {quote(result)}"
