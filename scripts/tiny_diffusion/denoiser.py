"""UNet and text encoder, trained together to predict v (Salimans and Ho 2022) on the fixed latents.

    z_t = √ᾱ z + √(1-ᾱ) ε      v = √ᾱ ε - √(1-ᾱ) z      loss = mean (v̂ - v)²

The schedule ends at no signal at all (zero terminal SNR, Lin et al. 2023), so that night and black come out dark. The
UNet's module names are a subset of those of Stable Diffusion 1.5: programs that know its LoRAs read ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorakit.reproduce.emoji.pictures import SEED, scenes

from .latents import CHANNELS, Projection
from .loop import Part
from .tokenizer import LENGTH

ROWS = 32
TEXT_WIDTH = 96
VALIDATED_ON = 256  # pictures


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # has no effect on trailing steps; without it diffusers warns
        clip_sample=False,
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers means the number of heads
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_denoiser(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    torch.manual_seed(SEED)
    unet = new_unet().to(memory_format=torch.channels_last)  # 10 % faster steps (batch 32, one thread)
    return nn.ModuleDict({"unet": unet, "text_encoder": new_text_encoder(tokenizer)})


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """[n, LENGTH], padded as the pipeline does it."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """[count], one from each of `count` equal parts of 0..999, in random order: less noise between batches."""
    parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (parts * 1000 / count).long().clamp(max=999)


def denoising_loss(model: nn.Module, scheduler, latents: Tensor, ids: Tensor, seed: int) -> Tensor:
    """The mean squared error of v over a batch, with noise and timesteps drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = stratified_timesteps(len(latents), generator)
    noised = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    text = model["text_encoder"](ids).last_hidden_state
    predicted = model["unet"](noised, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    return F.mse_loss(predicted, scheduler.get_velocity(latents, noise, timesteps))


def denoiser_part(tokenizer: CLIPTokenizer, projection: Projection, rows: int = ROWS) -> Part:
    model, scheduler = new_denoiser(tokenizer), new_scheduler()

    def loss(step: int) -> Tensor:
        batch = scenes("denoiser", step, rows)
        ids = token_ids(tokenizer, batch.captions)
        return denoising_loss(model, scheduler, projection.encode(batch.pictures), ids, SEED + step)

    def validate(model: nn.Module) -> dict[str, float]:
        batch = scenes("validation", 0, VALIDATED_ON)
        latents, ids = projection.encode(batch.pictures), token_ids(tokenizer, batch.captions)
        return {"validation": denoising_loss(model, scheduler, latents, ids, SEED).item()}

    return Part("denoiser", model, loss, learning_rate=1.2e-3, average=0.9995, validate=validate)
