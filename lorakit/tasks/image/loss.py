"""The loss of a denoiser on a batch of latents.

    loss of a row = weight(t) · mean over the elements of (prediction - target)²
    with a mask     weight(t) · sum of mask (prediction - target)² / sum of mask

Timesteps and noise come from torch's default generator on the CPU: whoever seeds it gets the same step on any device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bases.pipeline import PipelineModel, is_text_encoder
from ...errors import ConfigError
from .objective import Objective
from .packing import Layout, layout_of
from .prompts import row_groups, take_rows
from .settings import DiffusionSettings
from .timesteps import sample_timesteps

QUARTILES = 4


def losses(
    model: PipelineModel,
    latents: Tensor,
    prompts: Mapping[str, Any],
    settings: DiffusionSettings,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the loss of each row: [rows], float32, with gradient.

    `model`: a pipeline's (`as_module`), or what wraps it for several processes, whose forward is then called;
    `latents`: [rows, ...] as `encode_pictures` returns them, on the model's device; `prompts`: the call's arguments for
    these rows (`batch_prompts`, `text_prompts`); `mask`: [rows, 1, H, W] of pixels in 0..1, what counts.

    Raises TrainError for a pipeline that cannot be trained this way; ConfigError for settings that do not fit it.
    """
    own, latents = _unwrapped(model), latents.float()
    scheduler = own.pipe.scheduler
    layout, objective = layout_of(own, latents, prompts), Objective.of(scheduler)
    t = sample_timesteps(scheduler, len(latents), None, trained_timesteps(own, settings), layout.mu)
    noise = offset_noise(latents, settings.noise_offset)
    error = squared_error(model, layout, objective, latents, noise, t, prompts, settings)
    return row_means(error, layout, latents, mask) * objective.weights(t, settings.min_snr).to(error.device)


@torch.no_grad()
def fixed_losses(
    model: PipelineModel,
    latents: Tensor,
    prompts: Mapping[str, Any],
    settings: DiffusionSettings,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Return each row's loss at the middle of each quartile of the timesteps, without weights: [rows, 4].

    Noise is a function of the row's seed alone (`seed` + row, or one seed for each row), so that two calls are equal,
    and a row's loss does not depend on the rows beside it but for rounding.
    """
    own, latents = _unwrapped(model), latents.float()
    settings = trained_timesteps(own, settings)
    layout, objective = layout_of(own, latents, prompts), Objective.of(own.pipe.scheduler)
    low, high = settings.min_timestep, settings.max_timestep or objective.steps
    seeds = [seed + row for row in range(len(latents))] if isinstance(seed, int) else list(seed)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    columns = []
    for quartile in range(QUARTILES):
        middle = low + (quartile + 0.5) / QUARTILES * (high - low)
        t = torch.full((len(latents),), middle)
        t = t if objective.kind == "flow" else t.long()
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
        error = squared_error(model, layout, objective, latents, noise, t, prompts, settings)
        columns.append(row_means(error, layout, latents, None))
    return torch.stack(columns, dim=1)


def _unwrapped(model: Any) -> PipelineModel:
    own: PipelineModel = getattr(model, "module", model)  # DistributedDataParallel's
    return own


def trained_timesteps(model: PipelineModel, settings: DiffusionSettings) -> DiffusionSettings:
    """Return settings whose timesteps are those of the expert that is trained, where a pipeline has two.

    Wan 2.2's `transformer` predicts from the share `boundary_ratio` of the timesteps on, `transformer_2` below.
    """
    boundary = model.pipe.config.get("boundary_ratio")
    experts = [name for name in model.components if not is_text_encoder(name)]
    if boundary is None or len(experts) != 2:
        return settings
    trained = [any(p.requires_grad for p in model.components[name].parameters()) for name in experts]
    if all(trained) or not any(trained):
        return settings
    steps = Objective.of(model.pipe.scheduler).steps
    edge, low, high = round(boundary * steps), settings.min_timestep, settings.max_timestep or steps
    low, high = (max(low, edge), high) if trained[0] else (low, min(high, edge))
    if low >= high:
        raise ConfigError(
            f"{experts[trained.index(True)]} predicts timesteps {'from' if trained[0] else 'below'} {edge}, and none "
            f"of them is between min_timestep ({settings.min_timestep}) and max_timestep "
            f"({settings.max_timestep or steps})"
        )
    return settings.replace(min_timestep=low, max_timestep=high)


def offset_noise(latents: Tensor, offset: float = 0.0) -> Tensor:
    """Draw noise of the latents' shape on the CPU; `offset` times a number for each row and channel is added to it."""
    noise = torch.randn(latents.shape)
    if offset:
        noise = noise + offset * torch.randn(*latents.shape[:2], *(1,) * (latents.dim() - 2))
    return noise.to(latents)


def squared_error(
    model: PipelineModel,
    layout: Layout,
    objective: Objective,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    prompts: Mapping[str, Any],
    settings: DiffusionSettings,
) -> Tensor:
    """Return (prediction - target)² in the layout of the scheduler's side, float32."""
    output = predict(model, layout, objective.noised(latents, noise, t), t, prompts, settings.guidance)
    target = layout.packed(objective.target(latents, noise, t))
    return F.mse_loss(output, target, reduction="none")


def predict(
    model: PipelineModel, layout: Layout, noised: Tensor, t: Tensor, prompts: Mapping[str, Any], guidance: float = 1.0
) -> Tensor:
    """Return the denoiser's prediction for noised latents, in the layout of the scheduler's side, float32.

    `t`: [rows], on any device. Rows share a call unless the pipeline has arguments for a whole batch in which they
    differ, or takes one timestep.
    """
    call = {**layout.call, **dict.fromkeys(layout.embedded, guidance)}
    rows, t = len(noised), t.to(noised.device)
    groups = row_groups(prompts, rows) if layout.together else [[row] for row in range(rows)]
    if len(groups) == 1 and layout.together:
        return model(layout.argument(noised), t, **take_rows(prompts, range(rows)), **call).output.float()
    outputs: list[Tensor] = [noised] * rows
    for group in groups:
        times = t[group] if layout.together else t[group[0]]
        output = model(layout.argument(noised[group]), times, **take_rows(prompts, group), **call).output.float()
        for row, own in zip(group, output):
            outputs[row] = own
    return torch.stack(outputs)


def row_means(error: Tensor, layout: Layout, latents: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of each row's errors, where the mask is: [rows]. A row whose mask is empty has no loss."""
    if mask is None:
        return error.flatten(1).mean(1)
    small = F.interpolate(mask.to(latents), size=latents.shape[-2:], mode="area")  # [rows, 1, h, w]
    small = small.unsqueeze(2) if latents.dim() == 5 else small
    weights = layout.packed(small.expand_as(latents)).flatten(1)
    return (error.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
