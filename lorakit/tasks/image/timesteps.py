"""Timesteps for a training step, by the pipeline's scheduler.

    diffusion       t uniform in {0 .. T - 1}
    flow matching   t = T s, s logit-normal or uniform in (0, 1), then shifted:  s <- a s / (1 + (a - 1) s)

a is the scheduler's static `shift` (SD3, Z-Image, Wan), or with `use_dynamic_shifting` (Flux, Qwen-Image) exp(μ),
where μ grows with the picture as the pipeline computes it (Esser et al. 2024, section 5.3.2).

The rows of a batch are stratified: one from each of `rows` equal parts of the distribution, in random order. The loss
of a step then varies less, and the distribution of each row is unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .objective import Objective
from .settings import DiffusionSettings

_CLOSEST = 1e-4  # a quantile this close to 0 or 1 is moved: logit-normal would be infinite there


def sample_timesteps(
    scheduler: Any, rows: int, generator: torch.Generator | None, settings: DiffusionSettings, mu: float | None = None
) -> Tensor:
    """Draw a timestep for each row: [rows], int64 for diffusion and float32 for flow matching, on the CPU.

    `generator`: None for torch's default one; `mu`: the shift that the pipeline computes for this picture size.

    Raises ConfigError for a range of timesteps that the scheduler does not have, and settings that do not fit it.
    """
    order = torch.randperm(rows, generator=generator)
    quantiles = (order + torch.rand(rows, generator=generator, dtype=torch.float64)) / rows
    return timesteps_at(quantiles, scheduler, settings, mu)


def timesteps_at(quantiles: Tensor, scheduler: Any, settings: DiffusionSettings, mu: float | None = None) -> Tensor:
    """Return the timesteps at these quantiles, in 0..1, of the distribution that `sample_timesteps` draws from."""
    objective = Objective.of(scheduler)
    low, high = _range(objective, settings)
    if objective.kind != "flow":
        if settings.timestep_sampling == "logit-normal":
            s = _logit_normal(quantiles, settings)
        else:
            s = quantiles
        if settings.timestep_shift not in ("auto", 1.0):
            raise ConfigError("timestep_shift is for flow matching, and this scheduler is none of it; leave it out")
        return (low + s * (high - low)).long().clamp(low, high - 1)
    s = quantiles if settings.timestep_sampling == "uniform" else _logit_normal(quantiles, settings)
    shift = shift_of(scheduler, settings, mu)
    s = shift * s / (1 + (shift - 1) * s)
    # Without any noise there is nothing to learn, so 0 is left out.
    return (low + s * (high - low)).clamp(min=_CLOSEST * objective.steps).float()


def shift_of(scheduler: Any, settings: DiffusionSettings, mu: float | None = None) -> float:
    """Return the factor a by which timesteps of flow matching are shifted."""
    if settings.timestep_shift != "auto":
        return _positive(settings.timestep_shift)
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    if mu is None:
        return 1.0
    return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)


def _positive(shift: float) -> float:
    if not shift > 0:
        raise ConfigError(f"timestep_shift must be larger than 0 (got {shift:g})")
    return float(shift)


def _logit_normal(quantiles: Tensor, settings: DiffusionSettings) -> Tensor:
    """Return the quantiles of sigmoid(m + d N(0, 1))."""
    normal = torch.special.ndtri(quantiles.clamp(_CLOSEST, 1 - _CLOSEST))
    return torch.sigmoid(settings.logit_mean + settings.logit_std * normal)


def _range(objective: Objective, settings: DiffusionSettings) -> tuple[int, int]:
    low, high = settings.min_timestep, settings.max_timestep or objective.steps
    if high > objective.steps or low >= high:
        raise ConfigError(
            f"timesteps {low} to {high} are not within the scheduler's {objective.steps:,} (min_timestep, max_timestep)"
        )
    return low, high
