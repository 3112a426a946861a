"""Validated settings, without torch: an adapter's (`LoraConfig`) and a training run's (`RunSettings`).

`LoraConfig` uses lorakit's names; `lorakit/formats/peft_config.py` maps them to PEFT's `adapter_config.json`. A run's
config, flat in YAML, joins `RunSettings` with the settings of all methods and tasks: see `lorakit/train/config.py`.
"""

from .lora import EXPERTS, MAX_RANK, LoraConfig, LoraSettings, Tokens, live_kinds, scale_of, variants
from .peft_names import PEFT_NAMES
from .placement import ALL_LINEAR, NONE, PRESETS, Narrowed, Placement, Saved
from .quantization import QUANTIZERS, Quantization
from .run import Auto, RunSettings, Source
from .strict import Choice, Strict, at_least_one, explain, joined, part

__all__ = [
    "ALL_LINEAR",
    "EXPERTS",
    "MAX_RANK",
    "NONE",
    "PEFT_NAMES",
    "PRESETS",
    "QUANTIZERS",
    "Auto",
    "Choice",
    "LoraConfig",
    "LoraSettings",
    "Narrowed",
    "Placement",
    "Quantization",
    "RunSettings",
    "Saved",
    "Source",
    "Strict",
    "Tokens",
    "at_least_one",
    "explain",
    "joined",
    "live_kinds",
    "part",
    "scale_of",
    "variants",
]
