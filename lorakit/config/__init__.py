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
from .virtual_tokens import VIRTUAL, VirtualTokenSettings, encoder_of, virtual_kind

__all__ = [
    "ALL_LINEAR",
    "EXPERTS",
    "MAX_RANK",
    "NONE",
    "PEFT_NAMES",
    "PRESETS",
    "QUANTIZERS",
    "VIRTUAL",
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
    "VirtualTokenSettings",
    "at_least_one",
    "encoder_of",
    "explain",
    "joined",
    "live_kinds",
    "part",
    "scale_of",
    "variants",
    "virtual_kind",
]
