"""Time a training step of AdaLoRA with lorakit and with PEFT, and of plain LoRA, on the Llama of `train_step`.

A step is forward, penalty, backward, AdamW, and the update of importances with a reduction of the ranks.

    python -m lorakit.bench.adalora
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lorakit as lk

from .measure import in_turn
from .train_step import PROJECTIONS, RANK, Shape, llama

STEPS = 100_000  # in the middle of the reduction of ranks throughout
SHAPE = Shape(layers=4, rows=2)


def lorakit_step(variant: str, ids: Tensor) -> Callable[[], None]:
    """Return a step of lorakit's."""
    model = lk.attach(llama(SHAPE, torch.float32), lk.LoraConfig(rank=RANK, variant=variant))
    optimizer = torch.optim.AdamW(lk.parameter_groups(model, 1e-4), fused=True)
    steps = itertools.count(STEPS // 4)

    def step() -> None:
        (model(input_ids=ids, labels=ids).loss + lk.penalty(model)).backward()
        optimizer.step()
        lk.after_step(model, next(steps), STEPS)
        optimizer.zero_grad()

    return step


def peft_step(ids: Tensor) -> Callable[[], None]:
    """Return a step of PEFT's AdaLoRA, with the same schedule."""
    import peft

    config = peft.AdaLoraConfig(
        init_r=RANK,
        target_r=RANK // 2,
        lora_alpha=32,
        tinit=STEPS // 10,
        tfinal=STEPS // 2,
        total_step=STEPS,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(llama(SHAPE, torch.float32), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    steps = itertools.count(STEPS // 4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(next(steps))
        optimizer.zero_grad()

    return step


def main() -> None:
    ids = torch.randint(0, SHAPE.vocabulary, (SHAPE.rows, SHAPE.length))
    sides = {
        "lorakit, lora": lorakit_step("lora", ids),
        "lorakit, adalora": lorakit_step("adalora", ids),
        "PEFT, adalora": peft_step(ids),
    }
    found = in_turn(sides, clock=time.process_time)
    theirs = found["PEFT, adalora"]
    print(f"{SHAPE}, rank {RANK} on all linears, fp32, {torch.get_num_threads()} thread(s); processor time of a step")
    for name, seconds in found.items():
        print(f"{name:<18} {1000 * seconds:8.1f} ms   {seconds / theirs:.2f} of PEFT's AdaLoRA")


if __name__ == "__main__":
    main()
