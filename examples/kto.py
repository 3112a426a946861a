"""Kahneman-Tversky optimization (Ethayarajh et al. 2024) with TRL's KTOTrainer: single answers, good or bad.

python examples/kto.py --out runs/kto
"""

from __future__ import annotations

from collections.abc import Sequence

import e2e
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

import lorakit as lk


def main(arguments: Sequence[str] | None = None) -> KTOTrainer:
    options = e2e.flags(__doc__, arguments, steps=100, rate=5e-4)
    model, tokenizer = e2e.load(options)
    lk.attach(model, lk.LoraConfig(rank=16))
    judged = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}
        for pair in e2e.pairs(options.rows)
        for good in (True, False)
    ]
    trainer = KTOTrainer(
        model,
        ref_model=lk.integrations.reference(model),
        args=KTOConfig(max_length=256, **e2e.settings(options)),
        train_dataset=Dataset.from_list(judged),
        processing_class=tokenizer,
    )
    lk.integrations.adapter_trainer(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    e2e.report(main(), "loss", "rewards/margins")
