"""A step of every kind of update, and from every start, runs on shapes alone, so that a run's memory is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import config_of
from test_plan_experts import batch

from lorakit.config import LoraConfig, variants
from lorakit.layers.init import starts
from lorakit.model.attach import attach
from lorakit.plan.shell import Shell
from lorakit.plan.step import evaluation, training_step
from lorakit.tasks import causal_lm as task
from lorakit.tasks.text.causal_loss import summed_loss
from lorakit.train.config import TrainConfig

KINDS = {name: {"variant": name} for name in variants() if name != "tokens"}
KINDS |= {name: {"init": name} for name in starts() if name != "loftq"}  # which needs a quantized base


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_an_evaluation_of_it_are_planned(kind):
    base, settings = config_of("llama"), LoraConfig(**({} if kind == "ia3" else {"rank": 4}), **KINDS[kind])

    def attached(model: Any) -> object:
        return attach(model, settings, batches=[] if kind in ("eva", "lora_ga") else None)

    planned = Shell("llama", lambda: task.skeleton(TrainConfig(data="-"), base, torch.float32), attached)
    assert planned.added_bytes > 0
    assert training_step(planned, batch(), summed_loss, False).flops > 0
    assert evaluation(planned, batch(), lambda model, given: model(**given)).flops > 0
