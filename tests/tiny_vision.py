"""Tiny vision models on disk with their image processors, and pictures with labels: a square of a colour on noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 16
COLOURS = {"blue": (20, 40, 230), "green": (20, 220, 40), "red": (230, 30, 20)}
MEAN, DEVIATION = 0.5, 0.5


def image_processor(resize: bool = True) -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_resize=resize)


def vit(seed: int = 0, **changes: Any) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTConfig(**{**sizes, "image_size": SIDE, "patch_size": 4, "initializer_range": 0.1} | changes)
    return ViTForImageClassification(config)


def convnext(seed: int = 0) -> Any:
    """It takes pictures of any size."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(seed)
    config = ConvNextConfig(
        patch_size=4, num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], layer_scale_init_value=1.0
    )
    return ConvNextForImageClassification(config)


def save(folder: Path, model: Any = None, resize: bool = True) -> Path:
    """A model's folder, with its image processor."""
    (model or vit()).save_pretrained(folder)
    image_processor(resize).save_pretrained(folder)
    return folder


def picture(label: str, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Noise with a square of the label's colour somewhere on it."""
    width, height = size
    chance = np.random.default_rng(seed)
    pixels = chance.integers(90, 160, (height, width, 3)).astype("uint8")
    x, y = chance.integers(0, width // 2), chance.integers(0, height // 2)
    pixels[y : y + height // 2, x : x + width // 2] = COLOURS[label]
    return Image.fromarray(pixels)


def write_folders(folder: Path, count: int = 24, sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)) -> Path:
    """`count` pictures in folders named by their labels. Labels and sizes alternate."""
    for number in range(count):
        label = list(COLOURS)[number % len(COLOURS)]
        path = folder / label / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(label, number, sizes[number // len(COLOURS) % len(sizes)]).save(path)
    return folder


def write_rows(folder: Path, count: int = 24, **options: Any) -> Path:
    """The same pictures in one folder, named by a file of rows."""
    write_folders(folder, count, **options)
    rows = [
        {"image": str(path.relative_to(folder)), "label": path.parent.name} for path in sorted(folder.glob("*/*.png"))
    ]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pixels_of(image: Image.Image) -> torch.Tensor:
    """[1, 3, H, W], as the image processor is set to make them."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return (values - MEAN) / DEVIATION
