"""PEFT's LN_TUNING folder, read as an adapter that adapts no module and has trained copies of norms.

    base_model.model.<norm>.ln_tuning_layers.<parameter>
    base_model.model.<module>.<parameter>                   modules_to_save

The same adapter is written as one of type LORA, with the norms among modules_to_save.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import NONE, LoraConfig

_TYPE = "LN_TUNING"
_KEY = re.compile(r"(?P<module>.+)\.ln_tuning_layers(\.[^.]+)?\.(?P<parameter>[^.]+)")


def as_lora(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a LORA config; those of other types as they are."""
    if values.get("peft_type") != _TYPE:
        return dict(values)
    targets, kept = values.get("target_modules"), values.get("modules_to_save") or []
    norms = targets if isinstance(targets, list) else []  # a regular expression: `with_norms` names the norms
    return {**values, "peft_type": "LORA", "target_modules": NONE, "modules_to_save": [*kept, *norms]}


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the keys that modules to save have."""
    return {_KEY.sub(r"\g<module>.\g<parameter>", key): tensor for key, tensor in tensors.items()}


def with_norms(config: LoraConfig, tensors: Mapping[str, Tensor], prefix: str) -> LoraConfig:
    """Return the config with all norms of the file among `save_modules`."""
    found = [match["module"].removeprefix(prefix) for key in tensors if (match := _KEY.fullmatch(key))]
    known = config.save_modules
    missing = [m for m in dict.fromkeys(found) if not any(f".{m}".endswith(f".{each}") for each in known)]
    return config.replace(save_modules=[*known, *missing]) if missing else config
