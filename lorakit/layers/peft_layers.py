"""PEFT's own layers on a model, beside which no adapter of lorakit's can be attached."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import StateError, listing
from .walk import base_modules


def check_none(model: nn.Module) -> None:
    """Raise StateError if the model carries layers of PEFT, such as those of diffusers' `load_lora_weights`."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # only a PEFT that is imported can have made some
    if tuners is None:
        return
    found = [name for name, module in base_modules(model) if isinstance(module, tuners.BaseTunerLayer)]
    if found:
        raise StateError(
            f"the model carries layers of PEFT ({listing(found, 2)}), beside which lorakit attaches nothing\n"
            "  remove them first: pipe.unload_lora_weights() or unet.unload_lora() in diffusers (delete_adapters keeps "
            "the layers), or a PeftModel's unload()\n"
            "  lorakit.Adapter.load reads the adapter's file itself"
        )
