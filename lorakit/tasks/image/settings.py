"""Settings of the diffusion objective: noise, timesteps, weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...config import Auto, Strict
from ...nondefault import nondefault

LOGIT_NORMAL = ("logit_mean", "logit_std")  # the settings that only logit-normal timesteps use


class DiffusionSettings(Strict):
    timestep_sampling: Literal["auto", "uniform", "logit-normal"] = Field(
        "auto", description="how timesteps are drawn; auto: logit-normal for flow matching, uniform otherwise"
    )
    logit_mean: float = Field(0.0, description="mean of logit-normal timesteps; above 0: more noise")
    logit_std: float = Field(1.0, gt=0, description="standard deviation of logit-normal timesteps")
    timestep_shift: float | Auto = Field(
        "auto",
        description="flow matching: shift s of the timesteps, s t / (1 + (s - 1) t); auto: as the scheduler says, by "
        "picture size where it does so; 1: none",
    )
    min_timestep: int = Field(0, ge=0, description="train on timesteps from here on; 0: little noise")
    max_timestep: int | None = Field(
        None, ge=1, description="train on timesteps up to here; default: all that the scheduler has, usually 1000"
    )
    min_snr: float | None = Field(
        None, gt=0, description="gamma of min-SNR weighting (5 is usual); not for flow matching"
    )
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="a share of noise that is the same all over a picture; 0.05 for darker darks"
    )
    guidance: float = Field(
        1.0, ge=0, description="what a guidance-distilled model (Flux, Flux.2) is given as its guidance while trained"
    )

    @model_validator(mode="after")
    def _range(self) -> DiffusionSettings:
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"max_timestep ({self.max_timestep}) must be larger than min_timestep ({self.min_timestep})"
            )
        return self

    @model_validator(mode="after")
    def _logit_normal(self) -> DiffusionSettings:
        names = nondefault(self, LOGIT_NORMAL)
        if names and self.timestep_sampling == "uniform":
            raise ValueError(f"{names[0]} is for logit-normal timesteps, and timestep_sampling is uniform")
        return self
