"""What methods do alike that adapt no module and train some of the base's own parameters as an adapter's copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...config import Choice, RunSettings
from .adapter import precision as of_adapters

if TYPE_CHECKING:
    import torch


def precision(config: RunSettings, device: torch.device) -> Choice:
    """Choose float32 unless a precision is given: the copies have the base's, and in bf16 small steps round to none."""
    import torch

    if config.precision != "auto":
        return of_adapters(config, device)
    return Choice(torch.float32, "what is trained has the base's precision, and bf16 would round small steps away")


def alone(config: RunSettings) -> tuple[str, str] | None:
    return f"method: {config.method}", (
        f"method: {config.method} trains copies of base weights, and a sweep does not train those side by side in one "
        "forward pass yet\n"
        "  start these runs one by one with lorakit train"
    )


def ending_in(model: Any, endings: list[str]) -> list[str]:
    """List the modules that `save_modules` names with these endings."""
    from ...layers.targets import module_names
    from ...module_names import ends_with

    return [name for name in module_names(model) if any(ends_with(name, ending) for ending in endings)]
