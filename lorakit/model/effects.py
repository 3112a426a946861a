"""Refuse settings of a new adapter that have no effect on what it trains."""

from __future__ import annotations

from ..config import NONE, VIRTUAL, LoraConfig
from ..errors import ConfigError
from ..layers.updates.update import live

# What has no effect where no module is adapted.
_OF_MODULES = ("rank", "alpha", "dropout", "rslora", "rank_pattern", "alpha_pattern", "lora_plus", "packed", "init")


def check_effects(config: LoraConfig) -> None:
    """Raise ConfigError for settings with another value than the default that its kind of update lacks
    (`LiveUpdate.lacks`), or all where no module is adapted.
    """
    kind = live(config.variant)
    lacking, why = kind.lacks, f"variant='{config.variant}' {kind.lacking}"
    if config.targets == NONE and config.variant not in VIRTUAL:
        lacking, why = _OF_MODULES, f"targets='{NONE}' adapts no module"
    fields = LoraConfig.model_fields
    given = [
        name
        for name in lacking
        if getattr(config, name) != fields[name].get_default(call_default_factory=True)
        and (name, getattr(config, name)) != ("targets", NONE)
    ]
    if given:
        beside = f"; LoRA with virtual tokens is prompt='{config.variant}' instead of variant"
        raise ConfigError(
            f"LoraConfig.{given[0]} has no effect: {why}\n"
            f"  remove {', '.join(given)}{beside if config.variant in VIRTUAL else ''}"
        )
