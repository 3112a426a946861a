"""Pictures with captions on disk, a tiny pipeline's folder, and a short run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_pipelines
from PIL import Image

from lorakit.train.config import TrainConfig


def write_pictures(
    folder: Path, count: int = 6, sizes: tuple[tuple[int, int], ...] = ((16, 16),), seed: int = 0
) -> Path:
    """Noisy pictures of these sizes in turn, each with a caption of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        flat = chance.integers(0, 256, 3)
        noisy = np.clip(flat + chance.integers(-40, 40, (height, width, 3)), 0, 255).astype("uint8")
        Image.fromarray(noisy).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a {('red', 'sks')[number % 2]} cat {number}")
    return folder


def save_pipeline(folder: Path, **options: Any) -> Path:
    """The folder of a tiny Stable Diffusion 1 pipeline."""
    tiny_pipelines.tiny_sd1(**options).save_pretrained(folder)
    return folder


def config(model: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    """A short run on one thread in float32."""
    values: dict[str, Any] = {
        "task": "text_to_image",
        "rank": 2,
        "steps": 4,
        "batch_size": 3,
        "learning_rate": 5e-3,
        "precision": "fp32",
        "threads": 1,
        "eval_every": 2,
        "sample_steps": 2,
    }
    return TrainConfig(**values | {"model": str(model), "data": str(data), "out": str(out)} | changes)
