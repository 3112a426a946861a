"""Tiny random pipelines of eight families for the exchange tests: diffusers' own classes, narrow, with the real models'
module names. A pipeline of a family is the same in each call.

`Family.predict` is the denoiser's prediction for fixed inputs. Where the family has CLIP text encoders their outputs go
into it, so an adapter of a text encoder shows as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as hub
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lorakit as lk
from lorakit.bases.pipeline import as_module, components_of

CLOSE = 1e-5
TOKENS = torch.tensor([[1, 7, 9, 4, 2], [1, 3, 8, 5, 2]])
TIMES = torch.tensor([100.0, 700.0])
# The sets of modules that a file is made of: attention layers; linears of the blocks; every linear and convolution of a
# UNet; every module of denoiser and text encoders, with mixed ranks and alphas; text encoders; these and attention.
UNET, DIT, TEXT = ("attention", "locon", "mixed"), ("attention", "blocks", "mixed"), ("text", "both")


@dataclass(frozen=True)
class Family:
    """`model`: as in `formats.names`. `text`: the text encoders that diffusers loads LoRAs into. `forms`: the other
    formats than its own that diffusers' loader takes for this family, and of which sets of modules.
    """

    model: str
    pipeline: type
    make: Callable[[], nn.Module]
    predict: Callable[[Any], Tensor]
    text: dict[str, type] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    width: int = 8  # of a text encoder
    forms: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def denoiser(self) -> str:
        return "unet" if self.model.startswith("sd") and self.model != "sd3" else "transformer"

    @property
    def kinds(self) -> tuple[str, ...]:
        return (UNET if self.denoiser == "unet" else DIT) + (TEXT if self.text else ())

    def pipe(self) -> Any:
        torch.manual_seed(0)
        made: dict[str, Any] = {self.denoiser: self.make().eval()}
        made |= {name: clip(kind, self.width) for name, kind in self.text.items()}
        return self.pipeline(**{part: made.get(part) for part in (*made, *self.parts)}, **_OPTIONS.get(self.model, {}))


_OPTIONS: dict[str, dict[str, Any]] = {
    "sd1": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
}


def clip(kind: type, width: int) -> nn.Module:
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=50,
            max_position_embeddings=10,
            projection_dim=width,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def noise(*shape: int) -> Tensor:
    """The same in each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def sd1() -> nn.Module:
    return hub.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl() -> nn.Module:
    return hub.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        transformer_layers_per_block=(1, 1, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def sd3() -> nn.Module:
    return hub.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )


def flux() -> nn.Module:
    return hub.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


def flux2() -> nn.Module:
    return hub.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def qwen_image() -> nn.Module:
    return hub.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def z_image() -> nn.Module:
    return hub.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )


def wan() -> nn.Module:
    return hub.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def _sd1(pipe: Any) -> Tensor:
    hidden = pipe.text_encoder(TOKENS)[0]
    return pipe.unet(noise(2, 4, 8, 8), TIMES, encoder_hidden_states=hidden).sample


def _two_texts(pipe: Any) -> tuple[Tensor, Tensor]:
    """(hidden states, pooled), each those of both text encoders side by side."""
    first, second = (encoder(TOKENS, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2))
    hidden = torch.cat([first.last_hidden_state, second.last_hidden_state], -1)
    pooled = [getattr(out, "text_embeds", None) for out in (first, second)]
    return hidden, torch.cat([p for p in pooled if p is not None], -1)


def _sdxl(pipe: Any) -> Tensor:
    hidden, pooled = _two_texts(pipe)
    added = {"text_embeds": pooled, "time_ids": noise(2, 6).abs()}
    return pipe.unet(noise(2, 4, 8, 8), TIMES, encoder_hidden_states=hidden, added_cond_kwargs=added).sample


def _sd3(pipe: Any) -> Tensor:
    hidden, pooled = _two_texts(pipe)
    return pipe.transformer(noise(2, 4, 8, 8), hidden, pooled, TIMES).sample


def _places(axes: int) -> Tensor:
    """Positions of 4 x 4 patches, [16, axes]: the second and third are row and column."""
    rows, columns = (grid.flatten().float() for grid in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    return torch.stack([torch.zeros(16), rows, columns, *[torch.zeros(16)] * (axes - 3)], -1)


def _flux(pipe: Any) -> Tensor:
    return pipe.transformer(
        hidden_states=noise(2, 16, 4),
        encoder_hidden_states=noise(2, 5, 16),
        pooled_projections=pipe.text_encoder(TOKENS).pooler_output,
        timestep=TIMES / 1000,
        img_ids=_places(3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def _flux2(pipe: Any) -> Tensor:
    return pipe.transformer(
        hidden_states=noise(2, 16, 4),
        encoder_hidden_states=noise(2, 5, 16),
        timestep=TIMES / 1000,
        guidance=torch.ones(2),
        img_ids=_places(4).repeat(2, 1, 1),
        txt_ids=torch.zeros(2, 5, 4),
    ).sample


def _qwen_image(pipe: Any) -> Tensor:
    return pipe.transformer(
        hidden_states=noise(2, 16, 16),
        encoder_hidden_states=noise(2, 5, 16),
        encoder_hidden_states_mask=torch.ones(2, 5),
        timestep=TIMES / 1000,
        img_shapes=[[(1, 4, 4)]] * 2,
    ).sample


def _z_image(pipe: Any) -> Tensor:
    pictures, texts = noise(2, 4, 1, 8, 8), noise(2, 5, 16)
    return torch.stack(pipe.transformer(list(pictures), TIMES / 1000, list(texts), return_dict=False)[0])


def _wan(pipe: Any) -> Tensor:
    return pipe.transformer(noise(2, 4, 1, 8, 8), TIMES, noise(2, 5, 16)).sample


_DIT = ("scheduler", "vae", "text_encoder", "tokenizer")
_TWO = ("scheduler", "vae", "tokenizer", "tokenizer_2")
FAMILIES = {
    family.model: family
    for family in (
        Family(
            "sd1",
            hub.StableDiffusionPipeline,
            sd1,
            _sd1,
            {"text_encoder": CLIPTextModel},
            ("vae", "tokenizer", "scheduler"),
            forms={"kohya": (*UNET, *TEXT)},
        ),
        Family(
            "sdxl",
            hub.StableDiffusionXLPipeline,
            sdxl,
            _sdxl,
            {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
            _TWO,
            forms={"kohya": (*UNET, *TEXT)},
        ),
        Family(
            "sd3",
            hub.StableDiffusion3Pipeline,
            sd3,
            _sd3,
            {"text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection},
            (*_TWO, "text_encoder_3", "tokenizer_3"),
        ),
        Family(
            "flux",
            hub.FluxPipeline,
            flux,
            _flux,
            {"text_encoder": CLIPTextModel},
            (*_TWO, "text_encoder_2"),
            forms={"kohya": ("joint", "text")},  # its sizes of the single blocks' parts are those of the real model
        ),
        Family(
            "flux2",
            hub.Flux2Pipeline,
            flux2,
            _flux2,
            parts=_DIT,
            # It leaves out modulations, and gives the last norm's halves in the wrong order.
            forms={"kohya": ("attention", "blocks"), "comfyui": ("attention", "blocks")},
        ),
        Family(
            "qwen_image",
            hub.QwenImagePipeline,
            qwen_image,
            _qwen_image,
            parts=_DIT,
            forms={"kohya": DIT, "comfyui": DIT},
        ),
        Family("z_image", hub.ZImagePipeline, z_image, _z_image, parts=_DIT, forms={"kohya": DIT, "comfyui": DIT}),
        Family(
            "wan",
            hub.WanPipeline,
            wan,
            _wan,
            parts=_DIT,
            # It raises without feed-forwards (kohya's form), or with the patch embedding.
            forms={"kohya": ("blocks",), "comfyui": ("attention", "blocks")},
        ),
    )
}


BLOCK = re.compile(r"(blocks|layers|refiner)\.\d+\.(?!.*(norm1|norm1_context|norm)\.linear)")
ATTENTION = re.compile(r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)$")


def adapted(family: Family, kind: str) -> dict[str, nn.Module]:
    """The modules of a pipeline that a file of this kind changes, by full name."""
    model = as_module(family.pipe())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    text = {n: m for n, m in linears.items() if n.startswith("text_encoder") and re.search(r"(self_attn|mlp)\.\w+$", n)}
    denoiser = {n: m for n, m in linears.items() if n.startswith(family.denoiser)}
    attention = {n: m for n, m in denoiser.items() if ATTENTION.search(n)}
    return {
        "attention": attention,
        "blocks": {n: m for n, m in denoiser.items() if BLOCK.search(n) and isinstance(m, nn.Linear)},
        "locon": denoiser,
        "mixed": denoiser | text,
        "joint": {n: m for n, m in denoiser.items() if n.startswith("transformer.transformer_blocks")},
        "text": text,
        "both": attention | text,
    }[kind]


def attached(family: Family, kind: str) -> Any:
    """A pipeline with random factors on the modules of this kind: rank 4, alpha 8; mixed: ranks 1 to 3, six alphas."""
    made, updates = torch.Generator().manual_seed(1), {}
    for i, (name, module) in enumerate(adapted(family, kind).items()):
        rank, alpha = (1 + i % 3, 0.5 + i % 6) if kind == "mixed" else (4, 8.0)
        out, *inner = module.weight.shape
        A = 0.2 * torch.randn(rank, *inner, generator=made)
        B = 0.2 * torch.randn(out, rank, *[1] * (len(inner) - 1), generator=made)
        updates[name] = lk.Factors(A, B, alpha, "conv" if len(inner) > 1 else "linear")
    pipe, config = family.pipe(), lk.LoraConfig(rank=4, alpha=8, targets=[next(iter(updates))])
    metadata = lk.capture(lk.attach(pipe, config)).metadata  # the base's fingerprint, which tells the family
    lk.detach(pipe)
    return lk.attach(pipe, lk.Adapter(config, updates, metadata=metadata))


def predict(family: Family, pipe: Any) -> Tensor:
    with torch.no_grad():
        return family.predict(pipe)


def placed(pipe: Any) -> int:
    """How many modules of a pipeline carry a LoRA of PEFT's."""
    return sum("lora_A" in m._modules and len(m.lora_A) for c in components_of(pipe).values() for m in c.modules())
