"""Timesteps: their distribution, against diffusers' own shift and density; their range; their determinism."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from tiny_pipelines import scheduler

from lorakit.errors import ConfigError
from lorakit.tasks.image.settings import DiffusionSettings
from lorakit.tasks.image.timesteps import sample_timesteps, timesteps_at

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
QUANTILES = torch.tensor([0.001, 0.1, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)


def test_diffusion_is_uniform_over_whole_numbers():
    torch.manual_seed(0)
    t = sample_timesteps(scheduler(), 1000, None, DiffusionSettings())
    assert torch.equal(t.sort().values, torch.arange(1000))  # stratified: each once
    assert not torch.equal(t, t.sort().values)


def test_they_are_a_function_of_the_seed():
    torch.manual_seed(3)
    once = sample_timesteps(FLOW(), 4, None, DiffusionSettings())
    torch.manual_seed(3)
    again = sample_timesteps(FLOW(), 4, None, DiffusionSettings())
    other = sample_timesteps(FLOW(), 4, torch.Generator().manual_seed(3), DiffusionSettings())
    assert torch.equal(once, again)
    assert torch.equal(once, other)


def test_rows_of_a_batch_are_spread_and_each_is_distributed_as_alone():
    generator = torch.Generator().manual_seed(0)
    batches = torch.stack([sample_timesteps(scheduler(), 4, generator, DiffusionSettings()) for _ in range(4000)])
    assert torch.equal((batches // 250).sort(dim=1).values, torch.arange(4).expand(4000, 4))
    first = batches[:, 0].double()
    assert abs(first.mean() - 499.5) < 15
    assert abs(first.std() - 288.7) < 10


def test_logit_normal_is_the_density_of_diffusers():
    settings = DiffusionSettings(logit_mean=0.3, logit_std=0.8)
    t = sample_timesteps(FLOW(), 20000, torch.Generator().manual_seed(0), settings) / 1000
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 20000, logit_mean=0.3, logit_std=0.8, generator=torch.Generator().manual_seed(0)
    )
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(t.quantile(at), theirs.quantile(at), atol=0.01, rtol=0)


def test_the_static_shift_is_the_schedulers():
    made = FLOW(shift=3.0)
    t = timesteps_at(QUANTILES, made, DiffusionSettings(timestep_sampling="uniform"))
    plain = FLOW(shift=1.0)
    plain.set_timesteps(timesteps=None, sigmas=QUANTILES.tolist())
    made.set_timesteps(timesteps=None, sigmas=QUANTILES.tolist())
    torch.testing.assert_close(t, made.timesteps, atol=1e-3, rtol=1e-5)
    unshifted = DiffusionSettings(timestep_sampling="uniform", timestep_shift=1.0)
    torch.testing.assert_close(timesteps_at(QUANTILES, made, unshifted), plain.timesteps, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_dynamic_shift_is_the_schedulers(kind):
    made = FLOW(use_dynamic_shifting=True, time_shift_type=kind)
    t = timesteps_at(QUANTILES, made, DiffusionSettings(timestep_sampling="uniform"), mu=0.9)
    made.set_timesteps(sigmas=QUANTILES.tolist(), mu=0.9)
    torch.testing.assert_close(t, made.timesteps, atol=1e-3, rtol=1e-5)


def test_the_shift_of_other_schedulers_of_flow_matching():
    wan = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    settings = DiffusionSettings(timestep_sampling="uniform")
    assert torch.equal(timesteps_at(QUANTILES, wan, settings), timesteps_at(QUANTILES, FLOW(shift=3.0), settings))


def test_a_range_of_timesteps():
    settings = DiffusionSettings(min_timestep=200, max_timestep=400)
    for made in (scheduler(), FLOW(shift=3.0)):
        t = sample_timesteps(made, 64, torch.Generator().manual_seed(0), settings)
        assert t.min() >= 200
        assert t.max() < 400
        assert t.max() > 380


def test_bad_ranges_and_shifts_are_refused():
    with pytest.raises(ConfigError, match=r"max_timestep \(100\) must be larger than min_timestep \(300\)"):
        DiffusionSettings(min_timestep=300, max_timestep=100)
    with pytest.raises(ConfigError, match="not within the scheduler's 1,000"):
        sample_timesteps(scheduler(), 2, None, DiffusionSettings(max_timestep=2000))
    with pytest.raises(ConfigError, match="timestep_shift is for flow matching"):
        sample_timesteps(scheduler(), 2, None, DiffusionSettings(timestep_shift=3.0))
    with pytest.raises(ConfigError, match="larger than 0"):
        sample_timesteps(FLOW(), 2, None, DiffusionSettings(timestep_shift=0.0))
