"""Pictures to latents and back, by the autoencoder's config.

    SD, SDXL, SD3, Flux, Z-Image   z = (VAE(x) - shift_factor) scaling_factor
    Qwen-Image, Wan                z = (VAE(x) - latents_mean) / latents_std, with a dimension for frames
    Flux.2                         z = (patches of 2 x 2 of VAE(x) - mean) / √(var + ε), of the autoencoder's batch norm

The most likely latents are taken, not a sample of them: what is cached and what is not are then equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError, TrainError


@torch.no_grad()
def encode_pictures(pipe: Any, pixels: Tensor, where: Sequence[str] = ()) -> Tensor:
    """Encode pictures. `pixels`: [rows, 3, H, W] in -1..1, with H and W multiples of `size_multiple(pipe)`.

    Returns [rows, channels, h, w], or [rows, channels, 1, h, w] where the autoencoder is one for videos, in float32.

    Raises DataError, with the picture's name from `where`, if its latents are not finite; nothing is replaced.
    """
    vae = _vae(pipe)
    x = pixels.to(vae.device, vae.dtype)
    encoded = vae.encode(x[:, :, None] if _has_frames(vae) else x)
    found = getattr(encoded, "latent_dist", None)
    z = found.mode() if found is not None else encoded.latent
    z = _normalised(vae, z.float())
    for row in range(len(z)):
        if not torch.isfinite(z[row]).all():
            name = where[row] if row < len(where) else f"picture {row + 1} of the batch"
            raise DataError(
                f"{name}: the autoencoder's latents are not finite (NaN or infinity); it computes in "
                f"{str(vae.dtype).removeprefix('torch.')}\n"
                "  load the autoencoder in float32, or leave the picture out"
            )
    return z


@torch.no_grad()
def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents as `encode_pictures` returns them: pixels [rows, 3, H, W] in -1..1, float32."""
    vae = _vae(pipe)
    z = _denormalised(vae, latents.to(vae.device).float())
    pixels = vae.decode(z.to(vae.dtype), return_dict=False)[0].float()
    return (pixels[:, :, 0] if pixels.dim() == 5 else pixels).clamp(-1, 1)


def latent_scale(pipe: Any) -> int:
    """Return how many pixels wide a latent is: 8 for most pipelines, 16 for Flux.2."""
    scale = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 8
    return int(scale) * (2 if _in_patches(getattr(pipe, "vae", None)) else 1)


def size_multiple(pipe: Any) -> int:
    """Return the number of pixels that a picture's height and width must be multiples of."""
    processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
    steps = [latent_scale(pipe), int(getattr(getattr(processor, "config", None), "vae_scale_factor", 1))]
    for name in ("unet", "transformer"):
        patch = getattr(getattr(getattr(pipe, name, None), "config", None), "patch_size", None)
        if patch:
            steps.append(latent_scale(pipe) * int(patch[-1] if isinstance(patch, list | tuple) else patch))
    return max(steps)


# ------------------------------------------------------------------------------------- the autoencoder's config


def _vae(pipe: Any) -> Any:
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise TrainError(
            f"{type(pipe).__name__} has no autoencoder (vae), so pictures cannot be encoded\n  load the whole pipeline"
        )
    return vae


def _has_frames(vae: Any) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def _in_patches(vae: Any) -> bool:
    return isinstance(getattr(vae, "bn", None), nn.modules.batchnorm._BatchNorm)


def _normalised(vae: Any, z: Tensor) -> Tensor:
    if _in_patches(vae):
        z = z.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [rows, C, h / 2, 2, w / 2, 2]
        z = z.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # [rows, 4 C, h / 2, w / 2]
    mean, std = _statistics(vae, z)
    return (z - mean) / std


def _denormalised(vae: Any, z: Tensor) -> Tensor:
    mean, std = _statistics(vae, z)
    z = z * std + mean
    if _in_patches(vae):
        z = z.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)
        z = z.flatten(-2).flatten(-3, -2)
    return z


def _statistics(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation that latents are normalised with, shaped for `z`."""
    config = vae.config
    if _in_patches(vae):
        mean = vae.bn.running_mean.float()
        std = torch.sqrt(vae.bn.running_var.float() + config.get("batch_norm_eps", vae.bn.eps))
    else:
        scale = config.get("scaling_factor") or 1.0
        if config.get("latents_mean") and config.get("latents_std"):
            mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std) / scale
        else:
            mean, std = torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([1 / scale])
    shape = (1, -1) + (1,) * (z.dim() - 2)
    return mean.to(z.device, z.dtype).view(shape), std.to(z.device, z.dtype).view(shape)
