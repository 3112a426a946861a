"""The size of pictures that a diffusion pipeline was trained on, from its config files, without loading it.

resolution = the UNet's sample_size · pixels per latent       512 = 64 · 8 for Stable Diffusion 1.5
multiple   = pixels per latent · latents per patch            16 = 8 · 2 for transformers
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .load import EMBEDDED

# Pipelines of transformers take any size; they were trained around this one (SD3, Flux, Qwen-Image, Z-Image).
FALLBACK = 1024


def native_size(name: str) -> tuple[int, int] | None:
    """Return (resolution, multiple): all sides must be multiples of the latter. `name`: 'embedded', a folder, a hub id.

    None if it is no pipeline, or is not on this disk.
    """
    folder = _folder(name)
    if folder is None or not (folder / "model_index.json").is_file():
        return None
    per_latent = 2 ** (len(_config(folder / "vae").get("block_out_channels", (0,) * 4)) - 1)
    unet = _config(folder / "unet")
    if unet:  # takes any number of latents
        size = unet.get("sample_size")
        return (size * per_latent if isinstance(size, int) else FALLBACK), per_latent
    patch = _config(folder / "transformer").get("patch_size") or 1
    patch = max(patch) if isinstance(patch, list) else patch
    # Pipelines of transformers without patches of their own pack 2 x 2 latents into one.
    return FALLBACK, per_latent * max(2, patch)


def _folder(name: str) -> Path | None:
    if name == EMBEDDED:
        return Path(__file__).parents[1] / "assets" / "tiny-diffusion"
    path = Path(name).expanduser()
    if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "model_index.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
