"""Odds-ratio preference optimization (Hong et al. 2024) with TRL's ORPOTrainer, which needs no reference.

python examples/orpo.py --out runs/orpo
"""

from __future__ import annotations

from collections.abc import Sequence

import e2e
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import lorakit as lk


def main(arguments: Sequence[str] | None = None) -> ORPOTrainer:
    options = e2e.flags(__doc__, arguments, steps=100, rate=1e-3)
    model, tokenizer = e2e.load(options)
    lk.attach(model, lk.LoraConfig(rank=16))
    trainer = ORPOTrainer(
        model,
        ORPOConfig(max_length=256, **e2e.settings(options)),
        train_dataset=e2e.pairs(options.rows),
        processing_class=tokenizer,
    )
    lk.integrations.adapter_trainer(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    e2e.report(main(), "loss", "rewards/margins")
