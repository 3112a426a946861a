"""Make the lists of real module names that the kohya formats are read with: lorakit/formats/names/*.json.

    python scripts/make_name_lists.py

The names and shapes of `modules` are those of diffusers' and transformers' own classes, built from the published
configurations on the meta device (no weights). `ldm` says how the original code of the model names the same weights,
and which of diffusers' modules, in order, share one of them (kohya's names of SDXL, SD3 and Flux come from there).
tests/formats/test_names.py holds both against diffusers' checkpoint converters. The other diffusion transformers are in
`dit_names.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from dit_names import TRANSFORMERS, counted, originals, shapes_of
from torch import nn

FOLDER = Path(__file__).parents[1] / "lorakit" / "formats" / "names"
ADAPTABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)

SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
}
T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
SD3_MEDIUM = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
SD35_MEDIUM = SD3_MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
SD35_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
SD3 = {
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "joint_attention_dim": 4096,
    "out_channels": 16,
    "in_channels": 16,
}
FLUX = {"guidance_embeds": True}


def modules(model: nn.Module) -> dict[str, list[int]]:
    """Name -> the weight's shape, of all modules whose weight an adapter can change."""
    return {
        name: list(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, ADAPTABLE) and getattr(module, "weight", None) is not None
    }


def unet_ldm(names: dict[str, list[int]]) -> dict[str, list[str]]:
    """CompVis' and Stability's names of a UNet's modules, with two resnets in each block and three on the way up."""
    parts = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(4):
        attends = any(name.startswith(f"up_blocks.{i}.attentions") for name in names)
        places |= {f"down_blocks.{i}.resnets.{j}": f"input_blocks.{3 * i + j + 1}.0" for j in range(2)}
        places |= {f"down_blocks.{i}.attentions.{j}": f"input_blocks.{3 * i + j + 1}.1" for j in range(2)}
        places |= {f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{3 * i + 3}.0.op"}
        places |= {f"up_blocks.{i}.resnets.{j}": f"output_blocks.{3 * i + j}.0" for j in range(3)}
        places |= {f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for j in range(3)}
        places |= {f"up_blocks.{i}.upsamplers.0.conv": f"output_blocks.{3 * i + 2}.{2 if attends else 1}.conv"}
    found = {}
    for name in names:
        place = max((p for p in places if name == p or name.startswith(p + ".")), key=len)
        rest = name[len(place) + 1 :]
        found[".".join(filter(None, (places[place], parts.get(rest, rest))))] = [name]
    return found


def sd3_ldm(names: dict[str, list[int]]) -> dict[str, list[str]]:
    """Stability's names of SD3's modules."""
    found = {
        "x_embedder.proj": ["pos_embed.proj"],
        "context_embedder": ["context_embedder"],
        "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
        "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
        "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
        "final_layer.linear": ["proj_out"],
    }
    for i in range(38):
        here, there = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        sides = {
            "x_block": ("to_{}", "to_out.0", "ff", "norm1"),
            "context_block": ("add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
        }
        for side, (qkv, out, ff, norm) in sides.items():
            found |= {
                f"{there}.{side}.attn.qkv": [f"{here}.attn.{qkv.format(x)}" for x in "qkv"],
                f"{there}.{side}.attn.proj": [f"{here}.attn.{out}"],
                f"{there}.{side}.mlp.fc1": [f"{here}.{ff}.net.0.proj"],
                f"{there}.{side}.mlp.fc2": [f"{here}.{ff}.net.2"],
                f"{there}.{side}.adaLN_modulation.1": [f"{here}.{norm}.linear"],
            }
        found[f"{there}.x_block.attn2.qkv"] = [f"{here}.attn2.to_{x}" for x in "qkv"]
        found[f"{there}.x_block.attn2.proj"] = [f"{here}.attn2.to_out.0"]
    return {name: theirs for name, theirs in found.items() if all(t in names for t in theirs)}


def flux_ldm(names: dict[str, list[int]]) -> dict[str, list[str]]:
    """Black Forest Labs' names of Flux's modules."""
    found = {
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    }
    for theirs, ours in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        found[f"{theirs}.in_layer"] = [f"time_text_embed.{ours}.linear_1"]
        found[f"{theirs}.out_layer"] = [f"time_text_embed.{ours}.linear_2"]
    for i in range(19):
        here, there = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, qkv, out, ff, norm in (
            ("img", "to_{}", "to_out.0", "ff", "norm1"),
            ("txt", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
        ):
            found[f"{there}.{side}_attn.qkv"] = [f"{here}.attn.{qkv.format(x)}" for x in "qkv"]
            found[f"{there}.{side}_attn.proj"] = [f"{here}.attn.{out}"]
            found[f"{there}.{side}_mlp.0"] = [f"{here}.{ff}.net.0.proj"]
            found[f"{there}.{side}_mlp.2"] = [f"{here}.{ff}.net.2"]
            found[f"{there}.{side}_mod.lin"] = [f"{here}.{norm}.linear"]
    for i in range(38):
        here, there = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        found[f"{there}.linear1"] = [*(f"{here}.attn.to_{x}" for x in "qkv"), f"{here}.proj_mlp"]
        found[f"{there}.linear2"] = [f"{here}.proj_out"]
        found[f"{there}.modulation.lin"] = [f"{here}.norm.linear"]
    assert all(t in names for theirs in found.values() for t in theirs)
    return found


def save(
    name: str, shapes: dict[str, list[int]], ldm: dict[str, list[str]] | None = None, **more: list[int] | list[str]
) -> None:
    """One line a module: a difference between two versions can be read."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in shapes.items()]
    text = '{"modules": {\n' + ",\n".join(lines) + "\n}"
    if ldm:
        lines = [f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in ldm.items()]
        text += ',\n"ldm": {\n' + ",\n".join(lines) + "\n}"
    for key, values in more.items():
        if values:
            text += f",\n{json.dumps(key)}: {json.dumps(values)}"
    (FOLDER / f"{name}.json").write_text(text + "}\n", encoding="utf8")
    print(f"{name}: {len(shapes)} modules, {len(ldm or {})} ldm names")


def clip(values: dict[str, int]) -> dict[str, list[int]]:
    """With the level `text_model.`, which transformers 5 dropped from its class and files keep."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    found = modules(CLIPTextModelWithProjection(CLIPTextConfig(**values)))
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": shape
        for name, shape in found.items()
    }


def main() -> None:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        for name, config in (("sd1", SD1), ("sd2", SD2), ("sdxl", SDXL)):
            shapes = modules(UNet2DConditionModel(**config))
            save(name, shapes, unet_ldm(shapes))
        # One list for the family: SD3.5 large has the most blocks, SD3.5 medium a second attention in its first ones.
        shapes = modules(SD3Transformer2DModel(**SD3_MEDIUM, **SD3))
        for config in (SD35_MEDIUM, SD35_LARGE):
            shapes |= {
                n: s
                for n, s in modules(
                    SD3Transformer2DModel(**config, **SD3 | {"caption_projection_dim": 64 * config["num_layers"]})
                ).items()
                if n not in shapes
            }
        save("sd3", shapes, sd3_ldm(shapes))
        shapes = modules(FluxTransformer2DModel(**FLUX))
        save("flux", shapes, flux_ldm(shapes))
        for name, values in (("clip_l", CLIP_L), ("clip_g", CLIP_G), ("clip_h", CLIP_H)):
            save(name, clip(values))
        save("t5", modules(T5EncoderModel(T5Config(**T5))))
    for name, transformer in TRANSFORMERS.items():
        listed = counted(shapes_of(transformer))
        more = {"widths": list(transformer.widths), "swapped": list(transformer.swapped)}
        save(name, listed, originals(listed, transformer), **more)


if __name__ == "__main__":
    main()
