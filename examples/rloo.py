"""REINFORCE leave-one-out (Ahmadian et al. 2024) with TRL's RLOOTrainer: as grpo.py, with another advantage.

python examples/rloo.py --out runs/rloo
"""

from __future__ import annotations

from collections.abc import Sequence

import e2e
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

import lorakit as lk

BETA = 0.02


def main(arguments: Sequence[str] | None = None) -> RLOOTrainer:
    options = e2e.flags(__doc__, arguments, steps=60, rate=2e-3, batch=16)  # two prompts, eight answers each
    model, tokenizer = e2e.load(options)
    lk.attach(model, lk.LoraConfig(rank=16))
    base = lk.integrations.reference(model)
    config = RLOOConfig(beta=0.0, num_generations=8, max_completion_length=32, **e2e.settings(options))
    trainer = RLOOTrainer(
        model,
        reward_funcs=e2e.mentioned,
        args=config,
        train_dataset=Dataset.from_list(e2e.rows(options.rows)).select_columns("prompt"),
        eval_dataset=Dataset.from_list(e2e.rows(630, "test")[::20]).select_columns("prompt"),
        processing_class=tokenizer,
    )
    trainer.beta = config.beta = BETA
    add_fused_lm_head(base, temperature=trainer.temperature)
    trainer.ref_model = trainer.accelerator.prepare_model(base, evaluation_mode=True)
    lk.integrations.adapter_trainer(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    trained = main()
    e2e.report(trained, "reward", "kl")
    tuned = trained.evaluate()["eval_reward"]
    lk.activate(trained.model, None)
    print(f"reward on prompts not trained on: base {trained.evaluate()['eval_reward']:.3f}, tuned {tuned:.3f}")
