"""The learning rate: its schedule, and groups of parameters with a rate of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.train.config import TrainConfig
from lorakit.train.optimizer import build, rate_factor, update


def config(**changes) -> TrainConfig:
    return TrainConfig(data="x", **changes)


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_never_goes_up_after(schedule, warmup, steps):
    factors = [rate_factor(config(schedule=schedule, warmup=warmup), step, steps) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == 1
    peak = factors.index(1)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if schedule == "constant":
        assert set(factors[peak:]) == {1}


def test_the_schedules_reach_zero_after_the_last_step():
    for schedule in ("linear", "cosine"):
        assert rate_factor(config(schedule=schedule), 1000, 1000) == pytest.approx(0, abs=1e-12)
    assert rate_factor(config(warmup=0.1), 550, 1000) == pytest.approx(0.5)


def test_a_group_of_parameters_moves_at_its_own_rate_and_is_named():
    own, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    parameters = {"unet.a": own, "text_encoder.a": other}

    def factor(name: str) -> tuple[str, float]:
        return ("text_encoder", 0.5) if name.startswith("text_encoder") else ("", 1.0)

    optimizer = build(config(), nn.Module(), parameters, 1e-2, factor)
    own.grad, other.grad = torch.ones(2), torch.ones(2)
    assert update(optimizer, parameters, 1e-2, 2.0, 0) == {"text_encoder": 5e-3}
    torch.testing.assert_close(1 - own.detach(), torch.full((2,), 1e-2), rtol=1e-4, atol=0)  # Adam's first step
    torch.testing.assert_close(1 - other.detach(), torch.full((2,), 5e-3), rtol=1e-4, atol=0)
