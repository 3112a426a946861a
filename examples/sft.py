"""Supervised fine-tuning with TRL's SFTTrainer.

python examples/sft.py --out runs/sft
"""

from __future__ import annotations

from collections.abc import Sequence

import e2e
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lorakit as lk


def main(arguments: Sequence[str] | None = None) -> SFTTrainer:
    options = e2e.flags(__doc__, arguments, steps=200, rate=2e-3)
    model, tokenizer = e2e.load(options)
    lk.attach(model, lk.LoraConfig(rank=16))
    trainer = SFTTrainer(
        model,
        SFTConfig(max_length=256, **e2e.settings(options)),  # the loss is on completions alone
        train_dataset=Dataset.from_list(e2e.rows(options.rows)),
        processing_class=tokenizer,
    )
    lk.integrations.adapter_trainer(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()  # the adapter, in PEFT's format
    return trainer


if __name__ == "__main__":
    e2e.report(main(), "loss", "mean_token_accuracy")
