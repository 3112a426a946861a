"""Mixtures of experts are planned with the grouped product that training uses, in every precision."""

from __future__ import annotations

import pytest
import torch
from architectures import MOE, causal_lm, config_of

from lorakit.config import LoraConfig
from lorakit.model.attach import attach
from lorakit.ops import IGNORE_INDEX
from lorakit.plan import step as step_file
from lorakit.plan.live import Live
from lorakit.plan.shell import Shell
from lorakit.plan.step import training_step
from lorakit.plan.weightless import Shapes, Weightless
from lorakit.tasks import causal_lm as task
from lorakit.tasks.text.causal_loss import summed_loss
from lorakit.train.config import TrainConfig


def batch(rows: int = 4, length: int = 48):
    ids = torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :10] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def planned_of(architecture: str, dtype: torch.dtype) -> Shell:
    base = config_of(architecture)
    build = lambda: task.skeleton(TrainConfig(data="-"), base, dtype)  # noqa: E731
    return Shell(type(base).__name__, build, lambda model: attach(model, LoraConfig(rank=4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", ["forward", "gradient of the input", "gradient of the weights"])
def test_a_grouped_product_has_the_size_of_the_real_one(shapes, dtype):
    rows, weights, offsets = torch.randn(24, 16), torch.randn(3, 16, 32), torch.tensor([8, 16, 24], dtype=torch.int32)
    grad = torch.randn(24, 32)
    a, b = {
        "forward": (rows, weights),
        "gradient of the input": (grad, weights.mT),
        "gradient of the weights": (rows.T, grad),
    }[shapes]
    expected = torch._grouped_mm(a.to(torch.bfloat16), b.to(torch.bfloat16), offs=offsets)
    with Shapes():
        made = torch._grouped_mm(
            Weightless(a.to("meta", dtype)), Weightless(b.to("meta", dtype)), offs=Weightless(offsets.to("meta"))
        )
    assert isinstance(made, Weightless)
    assert (made.shape, made.dtype) == (expected.shape, dtype)


@pytest.mark.parametrize(
    ("a", "b", "products"),
    [((24, 16), (3, 16, 32), 24 * 16 * 32), ((16, 24), (24, 32), 16 * 24 * 32)],
    ids=["forward", "gradient of the weights"],
)
def test_its_operations_are_counted(a, b, products):
    live = Live(through=Shapes())
    with live:
        torch._grouped_mm(
            Weightless(torch.empty(a, device="meta")),
            Weightless(torch.empty(b, device="meta")),
            offs=Weightless(torch.empty(3, dtype=torch.int32, device="meta")),
        )
    assert live.flops == 2 * products


class Plain(Shapes):
    """Operations as they are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", MOE)
def test_a_step_on_shapes_sees_what_a_real_step_makes(architecture, monkeypatch):
    planned = planned_of(architecture, torch.float32)
    training_step(planned, batch(), summed_loss, False)  # the loss looks at a model once
    expected = training_step(planned, batch(), summed_loss, False)
    real = attach(causal_lm(architecture), LoraConfig(rank=4)).train()
    planned.model, planned.stack, planned.shapes = real, real.model.layers, Plain()
    planned.foldable = False
    monkeypatch.setattr(step_file, "without_memory", lambda model: [*model.parameters(), *model.buffers()])
    training_step(planned, batch(), summed_loss, False)
    seen = training_step(planned, batch(), summed_loss, False)
    assert expected.flops == seen.flops
    for stretch, parts in seen.stretches.items():
        assert sum(expected.stretches[stretch].values()) == pytest.approx(sum(parts.values()), rel=0.05), stretch


@pytest.mark.parametrize("architecture", MOE)
def test_16_bits_are_planned_too(architecture):
    planned = planned_of(architecture, torch.bfloat16)
    assert training_step(planned, batch(), summed_loss, False).flops > 0


@pytest.mark.parametrize("architecture", MOE)
def test_the_factors_of_experts_are_counted(architecture):
    planned = planned_of(architecture, torch.float32)
    real = attach(causal_lm(architecture), LoraConfig(rank=4))
    trained = {name: p for name, p in real.named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in trained)
    assert planned.trained_parameters == sum(p.numel() for p in trained.values())
    assert planned.added_bytes == sum(p.numel() * p.element_size() for p in trained.values())
