"""The size of pictures that a diffusion pipeline was trained on, from its config files, without loading it.

resolution = the denoiser's sample_size · pixels per latent   512 = 64 · 8 for Stable Diffusion 1.5
multiple   = pixels per latent · latents per patch            16 = 8 · 2 for transformers
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .load import EMBEDDED

# Transformers without a sample_size (Flux, Qwen-Image, Z-Image) draw well from here to 1024 pixels, at a quarter of the
# cost.
FALLBACK = 512
MULTIPLE = 8  # of all sides: Stable Diffusion's pipelines ask for it whatever their autoencoder


def native_size(name: str, revision: str | None = None) -> tuple[int, int] | None:
    """Return (resolution, multiple): all sides must be multiples of the latter, and of `MULTIPLE`.

    `name`: 'embedded', a folder, or a hub id, of which `revision` is a branch, tag or commit.

    None if it is no pipeline, or is not on this disk.
    """
    folder = _folder(name, revision)
    if folder is None or not (folder / "model_index.json").is_file():
        return None
    vae, denoiser = _config(folder / "vae"), _config(folder / "unet") or _config(folder / "transformer")
    per_latent = vae.get("scale_factor_spatial")
    if not isinstance(per_latent, int) and "temperal_downsample" in vae:  # Qwen-Image's, in diffusers' spelling
        per_latent = 2 ** len(vae["temperal_downsample"])
    if not isinstance(per_latent, int):
        widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0] * 4
        per_latent = 2 ** (len(widths) - 1)
    size = denoiser.get("sample_size")
    resolution = size * per_latent if isinstance(size, int) else FALLBACK
    if (folder / "unet").is_dir():  # takes any number of latents
        return resolution, per_latent
    patch = denoiser.get("patch_size") or 1
    # Pipelines of transformers without patches of their own pack 2 x 2 latents into one.
    return resolution, per_latent * max(2, *(patch if isinstance(patch, list) else [patch]))


def _folder(name: str, revision: str | None) -> Path | None:
    if name == EMBEDDED:
        return Path(__file__).parents[1] / "assets" / "tiny-diffusion"
    path = Path(name).expanduser()
    if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "model_index.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
