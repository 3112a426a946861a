"""The learning rate that suits LoRA on a denoiser, by the width of its adapted modules."""

from __future__ import annotations

from statistics import median

from ...bases.pipeline import PipelineModel
from ...config import Choice
from ...layers.bases import base_of
from ...layers.layer import LoraLayer

# 1e-4 is what diffusers' scripts and users of kohya's trainer take for SD1.5 (widths 320 to 1,280) and all larger
# models, at a scale of 1. Small models take more: 3e-3 did best for the embedded one (widths 48 and 96).
RATE, WIDTH, POWER = 1e-4, 640, 1.3


def suited_rate(model: PipelineModel) -> Choice:
    """Return 1e-4 · max(1, (640 / width)^1.3). Width: the median of the adapted modules' inputs."""
    shapes = [base_of(m).shape(m) for m in model.modules() if isinstance(m, LoraLayer)]
    widths = [shape[1] for shape in shapes if len(shape) > 1]
    if not widths:
        return Choice(RATE, "a common rate for diffusion models")
    width = int(median(widths))
    return Choice(RATE * max(1.0, (WIDTH / width) ** POWER), f"for modules of width {width}")
