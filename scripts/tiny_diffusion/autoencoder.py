"""An AutoencoderKL whose latents are the fixed projection's.

Its encoder learns the projection; its decoder learns to see more in the latents than the projection can give back
(edges that go on in the next patch). Half of a batch is decoded from the encoder's own latents, half from the
projection's with noise added, so that the decoder forgives a denoiser that is not exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lorakit.reproduce.emoji.pictures import SEED, scenes
from lorakit.reproduce.emoji.styles import STYLES, some_styled

from .latents import CHANNELS, Projection
from .loop import Part

ROWS = 16
MAX_NOISE = 0.2  # standard deviation, of latents whose variance is one
LOG_VARIANCE = -6.0  # what the encoder says of its own uncertainty: a standard deviation of 0.05
VALIDATED_ON = 64  # pictures


def new_autoencoder() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def psnr(pictures: Tensor, originals: Tensor) -> float:
    """In dB, of pixels in -1..1."""
    error = ((pictures.clamp(-1, 1) - originals) / 2).square().mean()
    return float(-10 * error.log10())


def reconstruct(model: nn.Module, pictures: Tensor) -> Tensor:
    return model.decode(model.encode(pictures).latent_dist.mean).sample


def autoencoder_part(projection: Projection, rows: int = ROWS) -> Part:
    model = new_autoencoder().to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        pictures = some_styled(scenes("autoencoder", step, rows, unseen=True).pictures)
        pictures = pictures[torch.arange(rows).roll(step)]  # styled ones in either half
        latents = projection.encode(pictures)
        generator = torch.Generator().manual_seed(SEED + step)
        strength = torch.rand(rows, 1, 1, 1, generator=generator) * MAX_NOISE
        noised = latents + strength * torch.randn(latents.shape, generator=generator)
        moments = model.quant_conv(model.encoder(pictures.contiguous(memory_format=torch.channels_last)))
        mean, log_variance = moments.chunk(2, 1)
        half = rows // 2
        decoded = model.decode(torch.cat([mean[:half], noised[half:]])).sample
        return (
            F.mse_loss(mean, latents)
            + 1e-3 * F.mse_loss(log_variance, torch.full_like(log_variance, LOG_VARIANCE))
            + 10 * F.mse_loss(decoded, pictures)
            + F.l1_loss(decoded, pictures)
        )

    def validate(model: nn.Module) -> dict[str, float]:
        pictures = scenes("validation", 0, VALIDATED_ON).pictures
        latents = projection.encode(pictures)
        measures = {
            "psnr": psnr(reconstruct(model, pictures), pictures),
            "psnr_of_projection": psnr(model.decode(latents).sample, pictures),
            "encoder_error": F.mse_loss(model.encode(pictures).latent_dist.mean, latents).item(),
        }
        for name, style in STYLES.items():
            styled = style(pictures)
            measures[f"psnr_{name}"] = psnr(reconstruct(model, styled), styled)
        return measures

    return Part("autoencoder", model, loss, learning_rate=2e-3, validate=validate)
