"""Tiny pipelines of nine families, of diffusers' real classes with random weights, and arguments for their calls.

    for name, make in FAMILIES.items():
        family = make()                     # pipe, latents as the autoencoder gives them, encoded prompts of three rows

Those with `text` have text encoders and tokenizers made here, so that captions can be given as text; the tokenizers of
the others are on the hub, so that their prompts are random embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import tiny_pipelines as tiny
import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel, T5Tokenizer

ROWS = 3
TOKENS = 5  # of a random prompt
WIDTH = 12  # of a random prompt's embeddings


@dataclass(frozen=True)
class Family:
    """`pipe`; `prompts`: arguments of its call for three rows; `latents`: [3, ...] as its autoencoder gives them;
    `guidance`: what switches guidance off, by the family's documentation; `text`: whether it takes captions.
    """

    pipe: Any
    prompts: dict[str, Any]
    latents: Tensor
    guidance: dict[str, float]
    text: bool = False


def sd1() -> Family:
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH)}
    return Family(tiny.tiny_sd1(), prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 1.0}, text=True)


def sdxl() -> Family:
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, 2 * WIDTH), "pooled_prompt_embeds": _normal(ROWS, WIDTH)}
    return Family(tiny.tiny_sdxl(), prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 1.0}, text=True)


def sd3() -> Family:
    torch.manual_seed(0)
    words, others, third = tiny.tokenizer(), tiny.tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_autoencoder(),
        text_encoder=tiny.text_encoder(words, CLIPTextModelWithProjection),
        tokenizer=words,
        text_encoder_2=tiny.text_encoder(others, CLIPTextModelWithProjection),
        tokenizer_2=others,
        text_encoder_3=t5(third, 2 * WIDTH),
        tokenizer_3=third,
    )
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, 2 * WIDTH), "pooled_prompt_embeds": _normal(ROWS, 2 * WIDTH)}
    return Family(pipe, prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 1.0}, text=True)


def flux() -> Family:
    torch.manual_seed(0)
    words, others = tiny.tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=shifted_autoencoder(),
        text_encoder=tiny.text_encoder(words),
        tokenizer=words,
        text_encoder_2=t5(others, WIDTH),
        tokenizer_2=others,
        transformer=transformer.eval(),
    )
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH), "pooled_prompt_embeds": _normal(ROWS, WIDTH)}
    return Family(pipe, prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 1.0, "true_cfg_scale": 1.0}, text=True)


def chroma() -> Family:
    torch.manual_seed(0)
    words = t5_tokenizer()
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=False),
        vae=shifted_autoencoder(),
        text_encoder=t5(words, WIDTH),
        tokenizer=words,
        transformer=transformer.eval(),
    )
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH), "prompt_attention_mask": mask}
    return Family(pipe, prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 1.0}, text=True)


def flux2() -> Family:
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}
    vae = diffusers.AutoencoderKLFlux2(**sizes, **blocks, sample_size=16)
    vae.bn.running_mean.copy_(_normal(16))
    vae.bn.running_var.copy_(_normal(16).square() + 0.5)
    pipe = diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH)}
    return Family(pipe, prompts, _normal(ROWS, 16, 4, 4), {"guidance_scale": 1.0})


def qwen_image() -> Family:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH), "prompt_embeds_mask": mask}
    return Family(pipe, prompts, _normal(ROWS, 4, 1, 8, 8), {"true_cfg_scale": 1.0})


def z_image() -> Family:
    torch.manual_seed(0)
    words = chat_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[1024, 512, 512],
    )
    for parameter in transformer.parameters():  # its padding tokens are created without values
        if not parameter.isfinite().all() or parameter.abs().max() > 10:
            torch.nn.init.normal_(parameter, std=0.02)
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_autoencoder(),
        text_encoder=qwen3(words),
        tokenizer=words,
        transformer=transformer.eval(),
    )
    prompts = {"prompt_embeds": [_normal(length, WIDTH) for length in (5, 3, 4)]}
    return Family(pipe, prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 0.0}, text=True)


def wan() -> Family:
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
        scale_factor_temporal=4,
        scale_factor_spatial=2,
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer.eval(),
    )
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH)}
    return Family(pipe, prompts, _normal(ROWS, 4, 1, 8, 8), {"guidance_scale": 1.0})


def aura_flow() -> Family:
    """Not among the nine: its call takes one timestep for all rows."""
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    pipe = diffusers.AuraFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.autoencoder(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH), "prompt_attention_mask": mask}
    return Family(pipe, prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 1.0})


def pixart() -> Family:
    """Not among the nine: it draws standard sizes unless told otherwise, and predicts a variance too."""
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.autoencoder(),
        transformer=transformer.eval(),
        scheduler=tiny.scheduler(),
    )
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    prompts = {"prompt_embeds": _normal(ROWS, TOKENS, WIDTH), "prompt_attention_mask": mask}
    return Family(pipe, prompts, _normal(ROWS, 4, 8, 8), {"guidance_scale": 1.0})


OTHERS: dict[str, Callable[[], Family]] = {"aura_flow": aura_flow, "pixart": pixart}
FAMILIES: dict[str, Callable[[], Family]] = {
    "sd1": sd1,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "chroma": chroma,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "wan": wan,
}


# ------------------------------------------------------------------------------------- autoencoder, text encoders


def shifted_autoencoder() -> diffusers.AutoencoderKL:
    """`tiny_pipelines.autoencoder`, whose latents have a mean."""
    vae = tiny.autoencoder()
    vae.register_to_config(shift_factor=0.3, scaling_factor=1.6)
    return vae


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of a few words and letters."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in tiny.WORDS), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=16)


def t5(words: T5Tokenizer, width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def chat_tokenizer() -> Any:
    """A tokenizer of bytes with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return words


def qwen3(words: Any) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=600,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3Model(config).eval()


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
