"""The learning rate's schedule."""

from __future__ import annotations

import pytest

from lorakit.train.config import TrainConfig
from lorakit.train.optimizer import rate_factor


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
