"""Generalized knowledge distillation (Agarwal et al. 2024) with TRL's GKDTrainer.

    python examples/sft.py --out runs/sft
    python examples/gkd.py --teacher runs/sft --out runs/gkd

The teacher is another adapter of the same base, so it shares the base's weights: the student, of a lower rank, learns
its answers. Any other model with the same vocabulary can be a teacher too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import e2e
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

import lorakit as lk

# The trainer wants chats; this writes the rows as they are.
PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def main(arguments: Sequence[str] | None = None) -> GKDTrainer:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--teacher", default="runs/sft", help="the teacher's adapter")
    own, rest = parser.parse_known_args(arguments)
    options = e2e.flags(f"{__doc__}\n--teacher: the teacher's adapter", rest, steps=100, rate=1e-3)
    model, tokenizer = e2e.load(options)
    tokenizer.chat_template = PLAIN
    lk.attach(model, lk.Adapter.load(own.teacher), "teacher")
    lk.attach(model, lk.LoraConfig(rank=2), "student")
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in e2e.rows(options.rows)
    ]
    trainer = GKDTrainer(
        model,
        teacher_model=lk.integrations.reference(model, active="teacher"),
        args=GKDConfig(lmbda=0.5, max_new_tokens=32, max_length=256, **e2e.settings(options)),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
    )
    lk.integrations.adapter_trainer(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()  # the student
    return trainer


if __name__ == "__main__":
    e2e.report(main(), "loss")
