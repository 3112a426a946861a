"""Single files in the original code's names, packed by hand from the weights of tiny models of diffusers and
transformers.

q, k and v are one tensor, SDXL's second text encoder is in OpenCLIP's form, shift and scale are in the original order.
"""

from __future__ import annotations

from pathlib import Path

import pipelines as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.formats import names

DENOISER = "model.diffusion_model."
MODELS = {
    "sd1": lambda: {"unet": tiny.sd1_unet(), "text_encoder": tiny.clip()},
    "sdxl": lambda: {
        "unet": tiny.sdxl_unet(),
        "text_encoder": tiny.clip(),
        "text_encoder_2": tiny.clip(CLIPTextModelWithProjection),
    },
    "sd3": lambda: {
        "transformer": tiny.sd3_transformer(),
        "text_encoder": tiny.clip(CLIPTextModelWithProjection),
        "text_encoder_3": tiny.t5(),
    },
    "flux": lambda: {"transformer": tiny.flux_transformer(), "text_encoder": tiny.clip(), "text_encoder_2": tiny.t5()},
}
PREFIXES = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sd3", "text_encoder"): "text_encoders.clip_l.transformer.",
    ("sd3", "text_encoder_3"): "text_encoders.t5xxl.transformer.",
    ("flux", "text_encoder"): "text_encoders.clip_l.transformer.",
    ("flux", "text_encoder_2"): "text_encoders.t5xxl.transformer.",
}
OPEN_CLIP = "conditioner.embedders.1.model."


def weights_of(models: dict) -> dict[str, Tensor]:
    """All parameters in float64, by lorakit's names."""
    return {
        tiny.full_name(c, n): t.detach().double() for c, model in models.items() for n, t in model.state_dict().items()
    }


def turned(t: Tensor) -> Tensor:
    """The second half of the rows first: shift and scale for scale and shift."""
    return torch.cat(t.chunk(2)[::-1])


def pack(model: str, W: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the original code names and lays them out."""
    file, component = {}, next(iter(names.PIPELINES[model]))
    blocks = max((int(n.split(".")[2]) for n in W if n.startswith("transformer.transformer_blocks.")), default=0)
    continuous = {
        "transformer.norm_out.linear",
        *([f"transformer.transformer_blocks.{blocks}.norm1_context.linear"] if model == "sd3" else []),
    }
    for name, modules in names.module_list(names.PIPELINES[model][component].listed)["ldm"].items():
        full = [f"{component}.{m}" for m in modules]
        for kind in ("weight", "bias"):
            if all(f"{m}.{kind}" in W for m in full):
                rows = torch.cat([W[f"{m}.{kind}"] for m in full])
                file[f"{DENOISER}{name}.{kind}"] = turned(rows) if full[0] in continuous else rows
    for (m, component), prefix in PREFIXES.items():
        if m == model:
            file |= {prefix + n.removeprefix(f"{component}."): t for n, t in W.items() if n.startswith(f"{component}.")}
    return file | (
        pack_open_clip({n.partition(".")[2]: t for n, t in W.items() if n.startswith("text_encoder_2.")})
        if model == "sdxl"
        else {}
    )


def pack_open_clip(W: dict[str, Tensor]) -> dict[str, Tensor]:
    file = {f"{OPEN_CLIP}text_projection": W["text_projection.weight"].T}
    file |= {f"{OPEN_CLIP}ln_final.{kind}": W[f"text_model.final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for layer in range(2):
        here, there = f"text_model.encoder.layers.{layer}.", f"{OPEN_CLIP}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            file |= {f"{there}{b}.{kind}": W[f"{here}{a}.{kind}"] for a, b in parts.items()}
            file[f"{there}attn.in_proj_{kind}"] = torch.cat([W[f"{here}self_attn.{x}_proj.{kind}"] for x in "qkv"])
    return file


def single_file(path: Path, model: str, models: dict, dtype: torch.dtype = torch.float32) -> Path:
    """With what else such files hold: a VAE, a table of the schedule in float64, an integer."""
    for part in models.values():
        part.to(dtype)
    file = {name: t.to(dtype).contiguous() for name, t in pack(model, weights_of(models)).items()}
    made = torch.Generator().manual_seed(3)
    file |= {"first_stage_model.decoder.conv_in.weight": torch.randn(4, 4, 3, 3, generator=made).to(dtype)}
    file |= {
        "alphas_cumprod": torch.rand(10, generator=made, dtype=torch.float64),
        "model_ema.num_updates": torch.tensor(7),
    }
    save_file(file, path, {"modelspec.title": "tiny", "format": "pt"})
    return path


def made(model: str) -> dict:
    torch.manual_seed(0)
    return {name: part.eval() for name, part in MODELS[model]().items()}


def changed(W: dict[str, Tensor], adapter: lk.Adapter, weight: float = 1.0) -> dict[str, Tensor]:
    """W + ΔW in float64, by lorakit's names."""
    found = dict(W)
    for module, update in adapter.updates.items():
        found[f"{module}.weight"] = W[f"{module}.weight"] + weight * tiny.exact(update, W[f"{module}.weight"])
        if isinstance(update, Dense) and update.bias is not None:
            found[f"{module}.bias"] = W[f"{module}.bias"] + weight * update.bias.double()
    return found
