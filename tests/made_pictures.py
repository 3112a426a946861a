"""Pictures for tests: a scene whose every pixel differs, and folders of pictures with captions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def scene(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth gradient with a light square off the center, in RGB: any turn, flip or shift changes it."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, (40 * seed + 3 * x + 5 * y) % 200], -1).astype(np.uint8)
    pixels[height // 8 : height // 2, width // 8 : width // 3] = (250, 240, 10 + seed % 100)
    return Image.fromarray(pixels)


def write_pictures(folder: Path, captions: Mapping[str, str | None], size: tuple[int, int] = (48, 32)) -> Path:
    """Write one picture per name, each with another content; a caption goes into a .txt file beside it."""
    for seed, (name, caption) in enumerate(captions.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(*size, seed=seed).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf8")
    return folder


def write_lines(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path
