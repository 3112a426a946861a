"""Train the image demo's slider: a loop of one's own around `lk.attach`, as any PyTorch training is.

Each step draws noise, lets the base draw from it down to some timestep, and takes the loss of both ends of the slider
there. Neither pictures nor captions are needed.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..bases.load_pipeline import embedded_pipeline

NAME, FILE = "slider", "slider.safetensors"
PROMPTS = {"positive": "a large animal", "negative": "a small animal", "target": "an animal"}
# The strength η: at 3 the two ends had areas of ... (measured with the embedded pipeline, 80 steps of 6 rows).
STRENGTH, ROWS, RANK, RATE = 3.0, 6, 4, 1e-3


def train_slider(folder: Path, steps: int, seed: int) -> tuple[Path, float]:
    """Train the slider and write `folder`/slider.safetensors in diffusers' format, unless it is there already.

    Returns the file, and the seconds that it took.
    """
    import torch

    from ..bases.device import choose_device
    from ..bases.load_pipeline import load_pipeline
    from ..bases.pipeline import as_module
    from ..config import LoraConfig
    from ..model.attach import attach
    from ..model.capture import capture
    from ..tasks.image.settings import DiffusionSettings
    from ..tasks.image.slider import SliderSettings, slider_losses, slider_prompts

    path = folder / FILE
    if path.exists():
        return path, 0.0
    began = time.perf_counter()
    pipe = load_pipeline(str(embedded_pipeline()), torch.float32, choose_device().value)
    for component in as_module(pipe).children():
        component.requires_grad_(False)
    slider = SliderSettings(strength=STRENGTH, **PROMPTS)
    prompts = slider_prompts(pipe, slider)
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    torch.manual_seed(seed)
    model = attach(pipe, LoraConfig(rank=RANK, alpha=RANK, targets="locon"), name=NAME)
    trained = [p for p in as_module(model).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
    )
    for _ in range(steps):
        loss = slider_losses(as_module(pipe), shape, prompts, slider, DiffusionSettings(), ROWS, NAME).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    capture(pipe, NAME).save(path, format="diffusers")
    return path, time.perf_counter() - began
