"""What a denoiser is trained to predict, read from its scheduler's config.

    diffusion   x_t = √ᾱ_t x + √(1 - ᾱ_t) n        (Ho et al. 2020); SNR_t = ᾱ_t / (1 - ᾱ_t)
        epsilon        n
        v_prediction   √ᾱ_t n - √(1 - ᾱ_t) x       (Salimans and Ho 2022)
        sample         x
    flow        x_s = (1 - s) x + s n, s = t / T: n - x    (Lipman et al. 2022; Esser et al. 2024)

ᾱ is the scheduler's own `alphas_cumprod`, so that zero terminal SNR (`rescale_betas_zero_snr`, Lin et al. 2023) is in
it. Schedulers of the variance-exploding form (Euler) scale their latents to x_t before the denoiser sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ConfigError, TrainError

Kind = Literal["epsilon", "v_prediction", "sample", "flow"]
_KINDS: dict[str, Kind] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "flow_prediction": "flow",
}


@dataclass(frozen=True)
class Objective:
    """`kind`: what is predicted; `steps`: T, the number of timesteps; `alphas`: ᾱ, [T], None for flow matching."""

    kind: Kind
    steps: int
    alphas: Tensor | None = None

    @classmethod
    def of(cls, scheduler: Any) -> Objective:
        """Read the objective from a diffusers scheduler. Raises TrainError for one that does not say it."""
        config, name = scheduler.config, type(scheduler).__name__
        # The schedulers of flow matching alone have no prediction_type, and mix noise in with scale_noise.
        stated = config.get("prediction_type", "flow_prediction" if hasattr(scheduler, "scale_noise") else None)
        kind = _KINDS.get(str(stated))
        if config.get("use_flow_sigmas"):
            kind = "flow"
        steps = config.get("num_train_timesteps")
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if kind is None or not steps or (kind != "flow" and alphas is None):
            if kind is None and stated is not None:
                why = f"has prediction_type '{stated}', which is not known here"
            else:
                why = "has neither alphas_cumprod nor scale_noise, so how it mixes in noise is not known"
            raise TrainError(
                f"{name} {why}\n"
                "  expected a scheduler of epsilon, v_prediction, sample or flow matching, such as DDIMScheduler or "
                "FlowMatchEulerDiscreteScheduler"
            )
        if config.get("invert_sigmas"):
            raise TrainError(f"{name} counts its time backwards (invert_sigmas), which cannot be trained")
        return cls(kind, int(steps), None if kind == "flow" or alphas is None else alphas.detach().double().cpu())

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mix noise into clean latents. `x`, `noise`: [rows, ...]; `t`: [rows], in 0..T."""
        keep, add = self._mix(x, t)
        return keep * x + add * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the denoiser is to predict, in the shape of `x`."""
        if self.kind == "flow":
            return noise - x
        if self.kind == "v_prediction":
            keep, add = self._mix(x, t)
            return keep * noise - add * x
        return noise if self.kind == "epsilon" else x

    def clean(self, output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Return the x that a prediction for `sample` = x_t stands for. For epsilon, `t` must have some signal."""
        keep, add = self._mix(sample, t)
        if self.kind == "flow":
            return sample - add * output
        if self.kind == "v_prediction":
            return keep * sample - add * output
        return (sample - add * output) / keep if self.kind == "epsilon" else output

    def noise(self, output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Return the n that a prediction for `sample` = x_t stands for. For kind sample, `t` must have some noise."""
        keep, add = self._mix(sample, t)
        if self.kind == "flow":
            return sample + keep * output
        if self.kind == "v_prediction":
            return keep * output + add * sample
        return output if self.kind == "epsilon" else (sample - keep * output) / add

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ᾱ / (1 - ᾱ) at each timestep: [rows], float64. ConfigError for flow."""
        if self.alphas is None:
            raise ConfigError("flow matching has no signal-to-noise ratio of this kind; leave min_snr out")
        alpha = self.alphas[t.long().cpu()]
        return alpha / (1 - alpha)

    def weights(self, t: Tensor, min_snr: float | None = None) -> Tensor:
        """Return each row's loss weight: [rows], float32, on the CPU. With `min_snr` = γ that of Hang et al. 2023:

            epsilon  min(SNR, γ) / SNR (1 at SNR 0) · v_prediction  min(SNR, γ) / (SNR + 1) · sample  min(SNR, γ)

        Raises ConfigError for γ <= 0, which would train nothing, and for flow matching.
        """
        if min_snr is None:
            return torch.ones(len(t))
        if not min_snr > 0:
            raise ConfigError(f"min_snr must be larger than 0: at {min_snr:g} every weight is zero")
        if self.kind == "flow":
            raise ConfigError(
                "min_snr is for epsilon, v and sample prediction, and this scheduler is one of flow matching\n"
                "  leave min_snr out; timestep_sampling, logit_mean and timestep_shift say where the weight lies"
            )
        snr = self.snr(t)
        if self.kind == "epsilon":
            weights = torch.where(snr > min_snr, min_snr / snr, 1.0)
        else:
            weights = snr.clamp(max=min_snr)
            if self.kind == "v_prediction":
                weights = weights / (snr + 1)
        return weights.float()

    def _mix(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of x and of the noise in x_t, each [rows, 1, ...]."""
        if self.alphas is None:
            add = t.cpu().double() / self.steps
            keep = 1 - add
        else:
            alpha = self.alphas[t.long().cpu()]
            keep, add = alpha.sqrt(), (1 - alpha).sqrt()
        shape = (-1,) + (1,) * (x.dim() - 1)
        return keep.to(x.device, x.dtype).view(shape), add.to(x.device, x.dtype).view(shape)
