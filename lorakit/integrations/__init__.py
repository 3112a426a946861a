"""lorakit in other libraries' training loops: transformers' `Trainer`, and the trainers of TRL.

lk.attach(model, lk.LoraConfig(rank=16))
reference = lk.integrations.reference(model)                       # the base, with the same parameters
trainer = lk.integrations.adapter_trainer(DPOTrainer(model, ref_model=reference, ...))
trainer.train()                                                    # its checkpoints hold the adapter alone
"""

from .adapter_checkpoints import adapter_trainer
from .quantized_base import quantized_base
from .reference_model import reference

__all__ = ["adapter_trainer", "quantized_base", "reference"]
