"""Short names for LoRA's descendants that are LoRA with another setting: `variant="pissa"` means `init="pissa"`.

In papers and leaderboards they stand beside DoRA and LoHa, which are kinds of update of their own, and so they can be
named as a `variant` too: `lorakit sweep --variant lora,dora,pissa,rslora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHORT_NAMES: Mapping[str, Mapping[str, Any]] = {
    **{start: {"init": start} for start in ("pissa", "olora", "milora", "eva", "lora_ga", "loftq")},
    "rslora": {"rslora": True},
    "lora_plus": {"lora_plus": 16.0},  # the ratio that the paper recommends
    "lora_fa": {"freeze_a": True},
}
_DEFAULTS = {"init": "default", "rslora": False, "lora_plus": None, "freeze_a": False}


def spelled_out(values: Any) -> Any:
    """Return settings with a short name as `variant` replaced by the setting that it stands for.

    Raises ValueError if that setting has another value, other than its default.
    """
    for setting, value in stands_for(values).items():
        if setting in values and values[setting] not in (value, _DEFAULTS[setting]):
            raise ValueError(
                f"variant '{values['variant']}' stands for {setting}: {value}, but {setting} is {values[setting]}; "
                "give one of them"
            )
    meant = stands_for(values)
    return {**values, "variant": "lora", **meant} if meant else values


def stands_for(values: Any) -> Mapping[str, Any]:
    """Return the settings that the `variant` among these stands for; empty if it is no short name."""
    name = values.get("variant") if isinstance(values, Mapping) else None
    return SHORT_NAMES.get(name, {}) if isinstance(name, str) else {}
