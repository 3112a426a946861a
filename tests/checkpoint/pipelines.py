"""Tiny diffusion pipelines of the real classes, adapters for them with mixed ranks and strengths, and what those make
of the weights.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors

STRENGTHS = ((2, 1.0), (3, 4.0), (4, 6.5), (1, 1.0), (4, 4.0))  # rank and alpha, mixed over the modules
SIZE = 0.1  # of an update's numbers: some rounding of half precision, and no lost updates
UNET = {
    "sample_size": 8,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
}


def clip(kind=CLIPTextModel):
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=50,
        max_position_embeddings=10,
        projection_dim=12,
        bos_token_id=1,
        eos_token_id=2,
    )
    return kind(config)


def t5():
    config = T5Config(
        vocab_size=50, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def vae():
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, latent_channels=4)


def ddim():
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd1_unet():
    """SD1's own blocks, so that its modules have all of its names."""
    return diffusers.UNet2DConditionModel(block_out_channels=(4, 8, 12, 12), **UNET)


def small_unet(**more):
    sizes = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "block_out_channels": (8, 12),
    }
    return diffusers.UNet2DConditionModel(**UNET | sizes | more)


def sdxl_unet():
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 8),
        transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
        **UNET | {"cross_attention_dim": 24},
        **blocks,
    )


def flux_transformer():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


def sd3_transformer():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def pipeline(model: str):
    torch.manual_seed(0)
    absent = dict.fromkeys(("tokenizer", "feature_extractor", "image_encoder"))
    if model == "sd1":
        del absent["image_encoder"]
        parts = {"unet": small_unet(), "text_encoder": clip(), "scheduler": ddim(), "safety_checker": None}
        made = diffusers.StableDiffusionPipeline(vae=vae(), **parts, **absent, requires_safety_checker=False)
    elif model == "sdxl":
        parts = {"unet": sdxl_unet(), "text_encoder": clip(), "text_encoder_2": clip(CLIPTextModelWithProjection)}
        made = diffusers.StableDiffusionXLPipeline(vae=vae(), **parts, **absent, tokenizer_2=None, scheduler=ddim())
    elif model == "flux":
        parts = {
            "transformer": flux_transformer(),
            "text_encoder": clip(),
            "text_encoder_2": t5(),
            "tokenizer": None,
            "tokenizer_2": None,
        }
        made = diffusers.FluxPipeline(vae=vae(), **parts, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    else:
        clips = {
            "text_encoder": clip(CLIPTextModelWithProjection),
            "text_encoder_2": clip(CLIPTextModelWithProjection),
            "text_encoder_3": t5(),
        }
        absent = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
        made = diffusers.StableDiffusion3Pipeline(
            transformer=sd3_transformer(),
            vae=vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            **clips,
            **absent,
        )
    for part in models(made).values():
        part.eval()
    return made


def loaded(kind, folder: Path, **options):
    """A pipeline from a folder, as diffusers reads it; what these have none of must be said."""
    absent = set(kind._get_signature_keys(kind)[0]) - {p.name for p in Path(folder).iterdir()}
    return kind.from_pretrained(folder, **dict.fromkeys(absent), **options)


def models(pipe) -> dict[str, nn.Module]:
    """The components that an adapter can change."""
    return {
        n: m
        for n, m in pipe.components.items()
        if isinstance(m, nn.Module) and n.startswith(("unet", "transformer", "text_encoder"))
    }


def full_name(component: str, name: str) -> str:
    """As an `Adapter` has it: CLIP's layers are below `text_model` whatever transformers' version."""
    plain = component.startswith("text_encoder") and name.startswith(("encoder.layers", "final_layer_norm"))
    return f"{component}.text_model.{name}" if plain else f"{component}.{name}"


def targets(components: dict[str, nn.Module], wanted=lambda name: True) -> dict[str, Tensor]:
    """The weights that low-rank factors can change, by the adapter's names."""
    return {
        full_name(component, name): module.weight.detach()
        for component, model in components.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and wanted(full_name(component, name))
    }


def low_rank(weights: dict[str, Tensor], dora: bool = False, seed: int = 1) -> lk.Adapter:
    made, factors = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        rank, alpha = STRENGTHS[len(factors) % len(STRENGTHS)]
        ones = (1,) * (weight.dim() - 2)
        A = torch.randn(rank, *weight.shape[1:], generator=made)
        B = SIZE * torch.randn(weight.shape[0], rank, *ones, generator=made)
        factors[name] = f = Factors(A, B, alpha, "conv" if ones else "linear")
        if dora:
            norm = weight.float().flatten(1).norm(dim=1)[:, None]
            factors[name] = Dora(f, norm * (torch.rand(weight.shape[0], 1, generator=made) + 0.5))
    return lk.Adapter(lk.LoraConfig(rank=4, alpha=4), factors)


def of_other_kinds(weights: dict[str, Tensor]) -> lk.Adapter:
    """LoHa, LoKr and whole updates in turn."""
    made, others = torch.Generator().manual_seed(2), {}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    for i, (name, weight) in enumerate(weights.items()):
        out, flat = weight.shape[0], weight[0].numel()
        if i % 3 == 0:
            others[name] = Loha(
                SIZE * random(out, 2), random(2, flat), random(out, 2), random(2, flat), 3.0, shape=tuple(weight.shape)
            )
        elif i % 3 == 1:
            half = 2 if out % 2 == 0 and weight.shape[1] % 2 == 0 else 1
            others[name] = Lokr(
                1.0, w1=SIZE * random(half, half), w2=random(out // half, weight.shape[1] // half, *weight.shape[2:])
            )
        else:
            others[name] = Dense(SIZE * random(*weight.shape))
    return lk.Adapter(lk.LoraConfig(rank=4, alpha=4), others)


def exact(update, weight: Tensor) -> Tensor:
    """ΔW in float64, by the definitions."""
    W = weight.double()
    if isinstance(update, Dense):
        return update.weight.double().reshape(W.shape)
    if isinstance(update, Loha):
        first, second = update.w1a.double() @ update.w1b.double(), update.w2a.double() @ update.w2b.double()
        return (update.alpha / 2 * first * second).reshape(W.shape)
    if isinstance(update, Lokr):
        return torch.kron(update.w1.double(), update.w2.double().flatten(1)).reshape(W.shape)
    if not isinstance(update, Dora):
        low = (
            update.alpha / update.rank * torch.einsum("or,r...->o...", update.B.double().flatten(1), update.A.double())
        )
        return low.reshape(W.shape)
    low = exact(update.inner, weight)
    norm = (W + low).flatten(1).norm(dim=1)
    return (update.magnitude.double().flatten() / norm).reshape(-1, *(1,) * (W.dim() - 1)) * (W + low) - W


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component's safetensors files, one variant or several shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """How far a number that was rounded once may be from the exact one; float32 was also added up in."""
    return (
        {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 2e-6}
        if dtype != torch.float32
        else {"rtol": 1e-6, "atol": 2e-6}
    )


@torch.no_grad()
def outputs(pipe) -> dict[str, Tensor]:
    """What each of its models makes of a fixed input."""
    made, found = torch.Generator().manual_seed(7), {}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    for name, model in models(pipe).items():
        ids = torch.tensor([[1, 5, 9, 4, 2]])
        if name.startswith("text_encoder"):
            found[name] = model(ids)[0]
        elif isinstance(model, diffusers.UNet2DConditionModel):
            added = (
                {"text_embeds": random(1, 12), "time_ids": torch.arange(6.0)[None]}
                if model.config.addition_embed_type
                else None
            )
            context = random(1, 5, model.config.cross_attention_dim)
            found[name] = model(random(1, 4, 8, 8), torch.tensor([3]), context, added_cond_kwargs=added).sample
        elif isinstance(model, diffusers.FluxTransformer2DModel):
            found[name] = model(
                random(1, 6, 4),
                encoder_hidden_states=random(1, 5, 12),
                pooled_projections=random(1, 12),
                timestep=torch.tensor([0.3]),
                img_ids=torch.arange(18.0).reshape(6, 3),
                txt_ids=torch.zeros(5, 3),
                guidance=torch.tensor([3.5]),
            ).sample
        else:
            found[name] = model(random(1, 4, 8, 8), random(1, 5, 12), random(1, 24), torch.tensor([3])).sample
    return found
