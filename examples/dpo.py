"""Direct preference optimization (Rafailov et al. 2023) with TRL's DPOTrainer.

    python examples/dpo.py --out runs/dpo

The reference is the same model without its adapter: TRL would load a second one.
"""

from __future__ import annotations

from collections.abc import Sequence

import e2e
from trl import DPOConfig, DPOTrainer

import lorakit as lk


def main(arguments: Sequence[str] | None = None) -> DPOTrainer:
    options = e2e.flags(__doc__, arguments, steps=30, rate=5e-4)
    model, tokenizer = e2e.load(options)
    lk.attach(model, lk.LoraConfig(rank=16))
    trainer = DPOTrainer(
        model,
        ref_model=lk.integrations.reference(model),
        args=DPOConfig(max_length=256, beta=0.1, **e2e.settings(options)),
        train_dataset=e2e.pairs(options.rows),
        eval_dataset=e2e.pairs(630, "test").select(range(0, 600, 5)),
        processing_class=tokenizer,
    )
    lk.integrations.adapter_trainer(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    trained = main()
    e2e.report(trained, "loss", "rewards/margins")
    measured = trained.evaluate()
    margin, accuracy = measured["eval_rewards/margins"], measured["eval_rewards/accuracies"]
    print(f"pairs not trained on: reward margin {margin:.2f}, chosen preferred in {accuracy:.0%}")
