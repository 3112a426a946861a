"""Tiny pipelines of diffusers' real classes, whole: `tiny_sd1()` and `tiny_sdxl()` draw pictures of 16 pixels.

Weights are random from a seed. The UNets' modules are a subset of SD1.5's and of SDXL's, so that every format has names
for them. The tokenizer is a CLIP tokenizer whose vocabulary is made here: nothing is fetched.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import lorakit as lk

WIDTH = 12  # of a text encoder
LENGTH = 16  # tokens of a prompt, with the start and the end
PICTURE = 16  # pixels; the latents are 8 x 8
WORDS = ("a", "an", "the", "of", "on", "in", "cat", "dog", "red", "sks", "style", "animal")


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer: one token for each of `WORDS`, single bytes for the rest."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        spelled = [*word[:-1], f"{word[-1]}</w>"]
        while len(spelled) > 1:
            merges.append((spelled[0], spelled[1]))
            spelled[:2] = ["".join(spelled[:2])]
    whole = [*pieces, *(f"{p}</w>" for p in pieces), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(whole))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=LENGTH)


def text_encoder(words: CLIPTokenizer, kind: Any = CLIPTextModel) -> Any:
    """A CLIP text encoder of two layers for this tokenizer."""
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(words),
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config).eval()


def autoencoder() -> diffusers.AutoencoderKL:
    """Pictures of 16 pixels to latents of 8 x 8, 4 channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}
    return diffusers.AutoencoderKL(**sizes, **blocks, sample_size=PICTURE).eval()


def scheduler(**options: Any) -> diffusers.DDIMScheduler:
    """SD1's noise schedule; `prediction_type="v_prediction"` and the like as options."""
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1} | options
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **options)


_UNET = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 4, "in_channels": 4, "out_channels": 4}


def sd1_unet() -> diffusers.UNet2DConditionModel:
    """Two levels, with attention in the upper one and in the middle."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 12),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        **_UNET,
    ).eval()


def sdxl_unet() -> diffusers.UNet2DConditionModel:
    """SDXL's three levels, with one and two transformer blocks in the lower two. Two layers a block, as in SDXL: names
    of kohya's files count them.
    """
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        **_UNET,
    ).eval()


def tiny_sd1(seed: int = 0, **options: Any) -> diffusers.StableDiffusionPipeline:
    """A Stable Diffusion 1 pipeline. `options`: of its scheduler."""
    torch.manual_seed(seed)
    words = tokenizer()
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=sd1_unet(),
        scheduler=scheduler(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(seed: int = 0, **options: Any) -> diffusers.StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline with its two text encoders. `options`: of its scheduler."""
    torch.manual_seed(seed)
    words, others = tokenizer(), tokenizer()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(words),
        text_encoder_2=text_encoder(others, CLIPTextModelWithProjection),
        tokenizer=words,
        tokenizer_2=others,
        unet=sdxl_unet(),
        scheduler=scheduler(**options),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str | list[str] = "a red cat", seed: int = 3, steps: int = 2, **call: Any) -> torch.Tensor:
    """The latents [rows, 4, 8, 8] that a pipeline ends with, for fixed noise."""
    rows = len(prompt) if isinstance(prompt, list) else 1
    noise = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    call = {"guidance_scale": 3.0, "output_type": "latent", "height": PICTURE, "width": PICTURE} | call
    return pipe(prompt, num_inference_steps=steps, latents=noise, **call).images


def models(pipe) -> list[nn.Module]:
    return [m for m in pipe.components.values() if isinstance(m, nn.Module)]


def trained(pipe, name="default", seed=1, **config):
    """Attach a fresh adapter whose factors are random, and return its value."""
    lk.attach(pipe, lk.LoraConfig(**{"rank": 2, "alpha": 3, "targets": "kohya"} | config), name)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in models(pipe):
            for n, parameter in model.named_parameters():
                if f".lora_{name}." in n:
                    parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.2)
    return lk.capture(pipe, name)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
