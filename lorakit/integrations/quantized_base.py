"""Let a `Trainer` take a quantized base with adapters of lorakit.

transformers refuses to fine-tune a quantized model unless adapters of PEFT are on it, which it knows by an attribute.
Inside `quantized_base(model)` the model has that attribute, so the trainer is made as for any other base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .trained_adapter import trained_adapter

_SAYS_ADAPTED = "_hf_peft_config_loaded"


@contextmanager
def quantized_base(model: nn.Module) -> Iterator[None]:
    """Let trainers be made of this model, whose base is quantized, inside the `with` block:

        with lorakit.integrations.quantized_base(model):
            trainer = SFTTrainer(model, ...)

    Raises StateError unless the model has one adapter that is trained and active. Kinds of quantization that pass no
    gradients on are refused by `lorakit.attach`.
    """
    trained_adapter(model)
    before = model.__dict__.get(_SAYS_ADAPTED)
    model.__dict__[_SAYS_ADAPTED] = True
    try:
        yield
    finally:
        if before is None:
            del model.__dict__[_SAYS_ADAPTED]
        else:
            model.__dict__[_SAYS_ADAPTED] = before
