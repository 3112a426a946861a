"""A reward model with TRL's RewardTrainer: a classifier of one output, whose new head is trained in full.

python examples/reward.py --out runs/reward
"""

from __future__ import annotations

from collections.abc import Sequence

import e2e
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import lorakit as lk
from lorakit.bases.load import model_path


def main(arguments: Sequence[str] | None = None) -> RewardTrainer:
    options = e2e.flags(__doc__, arguments, steps=100, rate=1e-3)
    torch.manual_seed(options.seed)
    folder = model_path(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    lk.attach(model, lk.LoraConfig(rank=16, task="SEQ_CLS"))  # the adapter holds the head too
    trainer = RewardTrainer(
        model,
        RewardConfig(max_length=256, **e2e.settings(options)),
        train_dataset=e2e.pairs(options.rows),
        eval_dataset=e2e.pairs(630, "test").select(range(0, 600, 5)),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    lk.integrations.adapter_trainer(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    trained = main()
    e2e.report(trained, "loss", "accuracy")
    print(f"pairs not trained on: chosen preferred in {trained.evaluate()['eval_accuracy']:.0%}")
