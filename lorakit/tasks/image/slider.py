"""Concept sliders (Gandikota et al. 2023, arXiv 2311.12092): an adapter that turns a property up or down, from prompts.

    at scale +1:  ε(x_t, target) -> ε*(x_t, target) + η (ε*(x_t, positive) - ε*(x_t, negative))
    at scale -1:  ε(x_t, target) -> ε*(x_t, target) - η (ε*(x_t, positive) - ε*(x_t, negative))

ε is the prediction with the adapter and ε* that of the base; η is `strength`. What a pipeline predicts (noise, v, flow)
makes no difference, as each is linear in the noise. No pictures are needed: x_t is drawn by the base itself, from noise
down to t. With `preserve`, such as ["cat", "dog"], a row's prompts all begin with one of these words, so that a
property that comes with a kind of animal does not change the kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ...bases.pipeline import PipelineModel
from ...config import Strict
from ...errors import ConfigError
from ...model.activate import activate, active
from .loss import predict, row_means, trained_timesteps
from .objective import Objective
from .packing import Layout, layout_of
from .prompts import batch_prompts, encode_prompts
from .settings import DiffusionSettings
from .timesteps import sample_timesteps


class SliderSettings(Strict):
    """The setting `slider`: a property from prompts, without pictures."""

    positive: str = Field(min_length=1, description="a prompt that has the property: a very old person")
    negative: str = Field(min_length=1, description="the same without it, or with its opposite: a very young person")
    target: str = Field("", description="what the property is to be changed in: person; empty: everything")
    preserve: list[str] = Field(
        default_factory=list, description="words that stay as they are, each put before all three prompts in turn"
    )
    strength: float = Field(3.0, gt=0, description="η: how far the slider goes at scale 1")
    denoise_steps: int = Field(
        8, ge=1, le=1000, description="steps in which the base draws what the slider is trained on, from noise"
    )


@dataclass(frozen=True)
class SliderPrompts:
    """The three prompts encoded, each a list with an entry for each of `preserve` (one without any)."""

    target: list[dict[str, Tensor]]
    positive: list[dict[str, Tensor]]
    negative: list[dict[str, Tensor]]


def slider_prompts(pipe: Any, slider: SliderSettings) -> SliderPrompts:
    """Encode a slider's prompts with the pipeline's text encoders. Raises ConfigError if two of them are equal."""
    if slider.positive == slider.negative:
        raise ConfigError(
            f"slider: the positive and the negative prompt are both '{slider.positive}', so there is no property\n"
            "  give one that has it and one that has not"
        )
    return SliderPrompts(*(encode_prompts(pipe, texts) for texts in prompt_texts(slider)))


def prompt_texts(slider: SliderSettings) -> list[list[str]]:
    """Return the texts of the target, the positive and the negative prompt, each with every word of `preserve`."""
    before = [f"{word} " for word in slider.preserve] or [""]
    return [[f"{word}{text}".strip() for word in before] for text in (slider.target, slider.positive, slider.negative)]


def slider_losses(
    model: PipelineModel,
    shape: Sequence[int],
    prompts: SliderPrompts,
    slider: SliderSettings,
    settings: DiffusionSettings,
    rows: int = 1,
    name: str = "default",
) -> Tensor:
    """Return the slider's loss for rows drawn anew, each the mean over both directions: [rows], with gradient.

    `shape`: of one row's latents, as `encode_pictures` returns them; `name`: the adapter that is trained. The active
    adapters are the same afterwards. Random numbers come from torch's default generator.

    Raises ConfigError with gradient checkpointing, which would compute the forward pass again after the adapter's scale
    has changed; StateError for an adapter that cannot be scaled.
    """
    _check_not_checkpointed(model)
    scheduler, settings = model.pipe.scheduler, trained_timesteps(model, settings)
    objective = Objective.of(scheduler)
    device = next(model.parameters()).device
    words = torch.randint(len(prompts.target), (rows,)).tolist()
    target, positive, negative = (
        batch_prompts([own[word] for word in words]) for own in (prompts.target, prompts.positive, prompts.negative)
    )
    noise = torch.randn(rows, *shape).to(device)
    layout = layout_of(model, noise, target)
    t = sample_timesteps(scheduler, rows, None, settings, layout.mu)

    def predicted(x: Tensor, prompt: Mapping[str, Any], times: Tensor) -> Tensor:
        return predict(model, layout, x, times, prompt, settings.guidance)

    with torch.no_grad(), _scaled(model, name, None):
        x = denoised(noise, t, slider.denoise_steps, objective, layout, lambda x, s: predicted(x, target, s))
        base = predicted(x, target, t)
        direction = slider.strength * (predicted(x, positive, t) - predicted(x, negative, t))
    losses = torch.zeros(rows, device=device)
    for sign in (1.0, -1.0):
        with _scaled(model, name, sign):
            error = (predicted(x, target, t) - (base + sign * direction)).square()
        losses = losses + row_means(error, layout, noise, None) / 2
    return losses * objective.weights(t, settings.min_snr).to(device)


def denoised(noise: Tensor, t: Tensor, steps: int, objective: Objective, layout: Layout, predicted: Any) -> Tensor:
    """Return each row as it is at its own timestep `t`, by deterministic steps from noise (Song et al. 2021, DDIM).

    `predicted(x, times)`: the prediction in the scheduler's layout.
    """
    x, last = noise, objective.steps - (0 if objective.kind == "flow" else 1)
    for step in range(steps):
        now, then = (last - (last - t) * (step + more) / steps for more in (0, 1))
        if objective.kind != "flow":
            now, then = now.round().long(), then.round().long()
        output = layout.unpacked(predicted(x, now))
        x = objective.noised(objective.clean(output, x, now), objective.noise(output, x, now), then)
    return x


def _check_not_checkpointed(model: PipelineModel) -> None:
    checkpointed = [name for name, c in model.components.items() if getattr(c, "is_gradient_checkpointing", False)]
    if checkpointed:
        raise ConfigError(
            f"a slider cannot be trained with gradient checkpointing ({', '.join(checkpointed)}): the forward pass "
            "would be computed again after the adapter's scale has changed\n  set gradient_checkpointing: false"
        )


@contextmanager
def _scaled(model: PipelineModel, name: str, scale: float | None) -> Iterator[None]:
    """Use one adapter at a scale, or the base alone, and then what was active before."""
    before = active(model)
    activate(model, None if scale is None else {name: scale})
    try:
        yield
    finally:
        activate(model, before)
