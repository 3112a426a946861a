"""The interface of a kind of adapter that PEFT writes with a config and keys of its own: LOHA, LOKR, VERA.

Each is an object `KIND` in a file of its own, and a line of `peft.KINDS`. A folder of PEFT holds one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import listing
from .peft_keys import PREFIX


class PeftKind(Protocol):
    peft_type: str
    variant: str
    prefix: str = PREFIX  # of its keys

    def config(self, values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
        """Return (our config, fan_in_fan_out) from adapter_config.json. AdapterError as in `from_peft`."""

    def updates(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        where: Path,
        ours: dict[str, Any],
    ) -> tuple[dict[str, Update], dict[str, Tensor]]:
        """Return (module -> its update, saved weights). AdapterError for a wrong key.

        `tensors`: by key without PEFT's prefix; `ours`: lorakit.json, from which what `ours` wrote is removed.
        """

    def losses(self, adapter: Adapter) -> list[str]:
        """Return what PEFT's folder cannot hold of an adapter whose updates are all of this kind, one line each."""

    def tensors_of(self, adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
        """Return (the updates' tensors by PEFT's keys, each module's rank, each module's alpha)."""

    def fields(self, values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        """Return the fields of adapter_config.json. `values`: those of a LoraConfig (`peft_config.to_peft`)."""

    def ours(self, adapter: Adapter) -> dict[str, Any]:
        """Return what lorakit.json holds of the updates because PEFT's files have no place for it."""
        return {}

    def beside(self, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
        """Return what files of lorakit's own hold of the updates for the same reason: file name -> tensors."""
        return {}


# The fields that the configs of all kinds have.
_COMMON = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "r",
    "revision",
    "target_modules",
    "task_type",
)


def common(values: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Return the fields that all kinds share, and these others."""
    return {name: values[name] for name in (*_COMMON, *others)}


def trained_biases(adapter: Adapter, kind: str) -> list[str]:
    """A line for biases that are trained outside the modules to save, for kinds without a setting for them."""
    biases = [
        n
        for n in adapter.saved
        if n.endswith(".bias") and not any(f".{m}." in f".{n}" for m in adapter.config.save_modules)
    ]
    return [f"{len(biases)} trained biases ({listing(biases, 2)}): PEFT's {kind} has none"] if biases else []
