"""The diffusion transformers whose module names `make_name_lists.py` lists: diffusers' class, and the original names.

A list is short: "blocks.{40}.attn1.to_q" stands for the numbers 0 to 39. `renames` turns diffusers' name of a module
into the one that the model's first publisher gave it (ComfyUI's, musubi-tuner's and most trainers' name), one regular
expression after the other; `fused` lists the original modules that hold several of diffusers', row after row.
`widths`: the hidden sizes of the published models, the listed one first. tests/formats/test_dit_names.py holds all of
this against diffusers' own converters.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class Transformer(NamedTuple):
    """`classes`: (class, config) of each variant; their modules together make the list."""

    classes: tuple[tuple[str, dict[str, Any]], ...]
    widths: tuple[int, ...]
    renames: tuple[tuple[str, str], ...] = ()
    fused: dict[str, list[str]] = {}  # noqa: RUF012
    swapped: tuple[str, ...] = ()  # modules whose two halves of rows the original has the other way round


def _bfl(single: bool) -> dict[str, list[str]]:
    """Black Forest Labs' fused projections (Flux, Chroma, Flux.2)."""
    found = {
        "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.{x}" for x in QKV],
        "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.{x}" for x in ADDED],
    }
    parts = [*(f"attn.{x}" for x in QKV), "proj_mlp"]
    return found | (
        {"single_blocks.{}.linear1": [f"single_transformer_blocks.{{}}.{x}" for x in parts]} if single else {}
    )


_WAN = (
    (r"attn1\.to_out\.0", "self_attn.o"),
    (r"attn1\.to_", "self_attn."),
    (r"attn1\.", "self_attn."),
    (r"attn2\.to_out\.0", "cross_attn.o"),
    (r"attn2\.to_", "cross_attn."),
    (r"attn2\.add_([kv])_proj", r"cross_attn.\1_img"),
    (r"attn2\.norm_added_([kv])", r"cross_attn.norm_\1_img"),
    (r"attn2\.", "cross_attn."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"\.norm2", ".norm3"),
    (r"proj_in$", "before_proj"),
    (r"blocks\.(.*)\.proj_out$", r"blocks.\1.after_proj"),
    (r"^proj_out", "head.head"),
)
_FLUX_ENDS = (
    (r"^x_embedder", "img_in"),
    (r"^context_embedder$", "txt_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
)
_DOUBLE = (
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"ff_context\.(net\.0\.proj|linear_in)", "txt_mlp.0"),
    (r"ff_context\.(net\.2|linear_out)", "txt_mlp.2"),
    (r"ff\.(net\.0\.proj|linear_in)", "img_mlp.0"),
    (r"ff\.(net\.2|linear_out)", "img_mlp.2"),
)
_COSMOS = (
    (r"^transformer_blocks", "blocks"),
    (r"norm1\.linear_", "adaln_modulation_self_attn."),
    (r"norm2\.linear_", "adaln_modulation_cross_attn."),
    (r"norm3\.linear_", "adaln_modulation_mlp."),
    (r"attn1\.to_out\.0", "self_attn.output_proj"),
    (r"attn2\.to_out\.0", "cross_attn.output_proj"),
    (r"attn1\.to_([qkv])", r"self_attn.\1_proj"),
    (r"attn2\.to_([qkv])", r"cross_attn.\1_proj"),
    (r"attn1\.norm_([qk])", r"self_attn.\1_norm"),
    (r"attn2\.norm_([qk])", r"cross_attn.\1_norm"),
    (r"ff\.net\.0\.proj", "mlp.layer1"),
    (r"ff\.net\.2", "mlp.layer2"),
    (r"^norm_out\.linear_", "final_layer.adaln_modulation."),
    (r"^proj_out", "final_layer.linear"),
    (r"^time_embed\.t_embedder", "t_embedder.1"),
    (r"^time_embed\.norm", "t_embedding_norm"),
    (r"^patch_embed\.proj", "x_embedder.proj.1"),
)
_LTX = ((r"^proj_in", "patchify_proj"), (r"norm_([qk])$", r"\1_norm"))
_LTX2 = (
    (r"^audio_proj_in", "audio_patchify_proj"),
    *_LTX,
    (r"^time_embed\.", "adaln_single."),
    (r"^audio_time_embed\.", "audio_adaln_single."),
    (r"^av_cross_attn_(video|audio)_scale_shift", r"av_ca_\1_scale_shift_adaln_single"),
    (r"^av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
    (r"^av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
    (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),
)
_HUNYUAN = (
    (r"^context_embedder\.token_refiner\.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    (r"^context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"^(txt_in.*)attn\.to_out\.0", r"\1self_attn_proj"),
    (r"^(txt_in.*)ff\.net\.0\.proj", r"\1mlp.fc1"),
    (r"^(txt_in.*)ff\.net\.2", r"\1mlp.fc2"),
    (r"^(txt_in.*)norm_out\.linear", r"\1adaLN_modulation.1"),
    (r"^x_embedder", "img_in"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^(double.*)attn\.to_out\.0", r"\1img_attn_proj"),
    (r"attn\.to_add_out", "txt_attn_proj"),
    (r"^(double.*)attn\.norm_([qk])", r"\1img_attn_\2_norm"),
    (r"^(double.*)attn\.norm_added_([qk])", r"\1txt_attn_\2_norm"),
    (r"^(single.*)attn\.norm_([qk])", r"\1\2_norm"),
    (r"norm1_context\.linear", "txt_mod.linear"),
    (r"norm1\.linear", "img_mod.linear"),
    (r"^(single.*)norm\.linear", r"\1modulation.linear"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.fc1"),
    (r"ff_context\.net\.2", "txt_mlp.fc2"),
    (r"ff\.net\.0\.proj", "img_mlp.fc1"),
    (r"ff\.net\.2", "img_mlp.fc2"),
    (r"^(single.*)proj_out", r"\1linear2"),
    *_FLUX_ENDS[2:],
)
_HUNYUAN_FUSED = {
    "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv": [
        f"context_embedder.token_refiner.refiner_blocks.{{}}.attn.{x}" for x in QKV
    ],
    "double_blocks.{}.img_attn_qkv": [f"transformer_blocks.{{}}.attn.{x}" for x in QKV],
    "double_blocks.{}.txt_attn_qkv": [f"transformer_blocks.{{}}.attn.{x}" for x in ADDED],
    "single_blocks.{}.linear1": [
        f"single_transformer_blocks.{{}}.{x}" for x in (*(f"attn.{q}" for q in QKV), "proj_mlp")
    ],
}
_LUMINA = (
    (r"^time_caption_embed\.caption_embedder", "cap_embedder"),
    (r"^time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"attn\.to_out\.0", "attention.out"),
    (r"attn\.norm_([qk])", r"attention.\1_norm"),
    (r"linear_([123])$", r"w\1"),
    (r"norm1\.linear", "adaLN_modulation.1"),
    (r"norm1\.norm", "attention_norm1"),
    (r"^(context_refiner.*\.)norm1$", r"\1attention_norm1"),
    (r"\.norm2$", ".attention_norm2"),
    (r"^norm_out\.w1", "final_layer.adaLN_modulation.1"),
    (r"^norm_out\.w2", "final_layer.linear"),
)
_ATTENTION_BLOCKS = ("noise_refiner", "context_refiner", "layers")
_KREA = (
    (r"^transformer_blocks", "blocks"),
    (r"^text_fusion", "txtfusion"),
    (r"attn\.to_out\.0", "attn.wo"),
    (r"attn\.to_([qkv])$", r"attn.w\1"),
    (r"attn\.to_gate", "attn.gate"),
    (r"\.ff\.", ".mlp."),
    (r"^img_in", "first"),
    (r"^final_layer\.", "last."),
    (r"^time_embed\.linear_1", "tmlp.0"),
    (r"^time_embed\.linear_2", "tmlp.2"),
    (r"^time_mod_proj", "tproj.1"),
    (r"^txt_in\.linear_1", "txtmlp.1"),
    (r"^txt_in\.linear_2", "txtmlp.3"),
)
_MINIMAX = (
    (r"^token_refiner\.refiner_blocks", "token_refiner.blocks"),
    (r"^transformer_blocks", "blocks"),
    (r"attn\.to_out\.0", "attn.out_proj"),
    (r"attn\.norm_([qk])", r"attn.\1_norm"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
    (r"^audio_proj_in", "audio_patch_proj"),
    (r"^proj_in", "video_patch_proj"),
    (r"^context_embedder", "condition_proj"),
    (r"^time_embedder\.linear_1", "time_embedder.proj_in"),
    (r"^time_embedder\.linear_2", "time_embedder.proj_out"),
    (r"^norm_out\.linear", "final_layer.adaln_proj.linear"),
    (r"^norm_out\.norm", "final_layer.norm"),
    (r"^proj_out", "final_layer.video_out"),
    (r"^audio_proj_out", "final_layer.audio_out"),
)
_FLUX3 = (
    (r"^mode_blocks", "content_mode_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"attn\.to_out\.0", "attn_out"),
    (r"attn\.to_([qkv])", r"\1_proj"),
    (r"ff\.linear_in", "mlp_in"),
    (r"ff\.linear_out", "mlp_out"),
)
_AURA = (
    (r"^joint_transformer_blocks", "double_layers"),
    (r"^single_transformer_blocks", "single_layers"),
    (r"^(double.*)attn\.to_out\.0", r"\1attn.w2o"),
    (r"^(double.*)attn\.to_([qkv])$", r"\1attn.w2\2"),
    (r"attn\.add_([qkv])_proj", r"attn.w1\1"),
    (r"attn\.to_add_out", "attn.w1o"),
    (r"attn\.to_out\.0", "attn.w1o"),
    (r"attn\.to_([qkv])$", r"attn.w1\1"),
    (r"ff_context\.", "mlpC."),
    (r"^(double.*)ff\.", r"\1mlpX."),
    (r"ff\.", "mlp."),
    (r"linear_([12])$", r"c_fc\1"),
    (r"out_projection", "c_proj"),
    (r"norm1_context\.linear", "modC.1"),
    (r"^(double.*)norm1\.linear", r"\1modX.1"),
    (r"norm1\.linear", "modCX.1"),
    (r"^norm_out\.linear", "modF.1"),
    (r"^proj_out", "final_linear"),
    (r"^time_step_proj\.c_fc1", "t_embedder.mlp.0"),
    (r"^time_step_proj\.c_fc2", "t_embedder.mlp.2"),
    (r"^context_embedder", "cond_seq_linear"),
    (r"^pos_embed\.proj", "init_x_linear"),
)
_HIDREAM_CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "llama_layers": [*range(32), *[31] * 16],
}
_EMBEDDERS = tuple(
    (rf"^time_guidance_embed\.{ours}_embedder\.linear_{n}", f"{theirs}.{layer}_layer")
    for ours, theirs in (("timestep", "time_in"), ("guidance", "guidance_in"))
    for n, layer in ((1, "in"), (2, "out"))
)

TRANSFORMERS = {
    "flux2": Transformer(
        (("Flux2Transformer2DModel", {}),),
        (6144, 4096, 3072),
        (
            *_FLUX_ENDS,
            *_EMBEDDERS,
            (r"^(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear", r"\1.lin"),
            *_DOUBLE[:2],
            (r"^(single.*)attn\.to_qkv_mlp_proj", r"\1linear1"),
            (r"^(single.*)attn\.to_out$", r"\1linear2"),
            *_DOUBLE[2:],
        ),
        _bfl(single=False),
        ("norm_out.linear",),
    ),
    "wan": Transformer(
        (("WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}), ("WanVACETransformer3DModel", {})),
        (5120, 1536, 3072, 2048),
        _WAN,
    ),
    "qwen_image": Transformer((("QwenImageTransformer2DModel", {}),), (3072,)),
    "z_image": Transformer(
        (("ZImageTransformer2DModel", {}),),
        (3840,),
        (
            (r"^all_x_embedder\.2-1", "x_embedder"),
            (r"^all_final_layer\.2-1", "final_layer"),
            (r"attention\.to_out\.0", "attention.out"),
            (r"attention\.norm_([qk])", r"attention.\1_norm"),
        ),
        {f"{b}.{{}}.attention.qkv": [f"{b}.{{}}.attention.{x}" for x in QKV] for b in _ATTENTION_BLOCKS},
    ),
    "hunyuan_video": Transformer(
        (("HunyuanVideoTransformer3DModel", {}),), (3072,), _HUNYUAN, _HUNYUAN_FUSED, ("norm_out.linear",)
    ),
    "ltx": Transformer(
        (("LTXVideoTransformer3DModel", {}), ("LTXVideoTransformer3DModel", {"num_layers": 48})),
        (2048, 4096),
        (*_LTX, (r"^time_embed\.", "adaln_single.")),
    ),
    "ltx2": Transformer((("LTX2VideoTransformer3DModel", {}),), (4096, 2048), _LTX2),
    "chroma": Transformer(
        (("ChromaTransformer2DModel", {}),),
        (3072,),
        (
            (r"^(distilled_guidance_layer.*)linear_1", r"\1in_layer"),
            (r"^(distilled_guidance_layer.*)linear_2", r"\1out_layer"),
            *_FLUX_ENDS[:3],
            *_DOUBLE,
            (r"^(single.*)proj_out", r"\1linear2"),
        ),
        _bfl(single=True),
    ),
    "lumina2": Transformer(
        (("Lumina2Transformer2DModel", {}),),
        (768,),  # of keys and values; all others are multiples of it
        _LUMINA,
        {f"{b}.{{}}.attention.qkv": [f"{b}.{{}}.attn.{x}" for x in QKV] for b in _ATTENTION_BLOCKS},
    ),
    "hidream": Transformer((("HiDreamImageTransformer2DModel", _HIDREAM_CONFIG),), (2560,)),
    "cosmos": Transformer((("CosmosTransformer3DModel", {}),), (4096, 2048, 5120), _COSMOS),
    "ideogram4": Transformer(
        (("Ideogram4Transformer2DModel", {}),),
        (4608,),
        ((r"attention\.to_out\.0", "attention.o"),),
        {"layers.{}.attention.qkv": [f"layers.{{}}.attention.{x}" for x in QKV]},
    ),
    "krea2": Transformer((("Krea2Transformer2DModel", {}),), (1536,), _KREA),
    "ace_step": Transformer(
        (("AceStepTransformer1DModel", {}),),
        (2048,),
        ((r"attn\.to_out\.0", "attn.o_proj"), (r"attn\.to_([qkv])$", r"attn.\1_proj")),
    ),
    "minimax_h3": Transformer(
        (("MiniMaxH3Transformer3DModel", {}),),
        (5376,),
        _MINIMAX,
        {
            "token_refiner.blocks.{}.attn.qkv_proj": [f"token_refiner.refiner_blocks.{{}}.attn.{x}" for x in QKV],
            "blocks.{}.attn.qkv_proj": [f"transformer_blocks.{{}}.attn.{x}" for x in QKV],
        },
        ("transformer_blocks.{}.ff.net.0.proj", "token_refiner.refiner_blocks.{}.ff.net.0.proj"),
    ),
    "flux3": Transformer((("Flux3Transformer2DModel", {}),), (3072,), _FLUX3),
    "auraflow": Transformer((("AuraFlowTransformer2DModel", {}),), (3072,), _AURA, {}, ("norm_out.linear",)),
    "cogvideox": Transformer(
        (("CogVideoXTransformer3DModel", {"num_layers": 42, "num_attention_heads": 48}),), (3072, 1920)
    ),
    "cogview4": Transformer((("CogView4Transformer2DModel", {}),), (2560, 4096)),
    "mochi": Transformer((("MochiTransformer3DModel", {}),), (3072,)),
    "sana": Transformer((("SanaTransformer2DModel", {}),), (2240, 1152)),
    "kandinsky5": Transformer((("Kandinsky5Transformer3DModel", {}),), (2048, 1792, 4096)),
    "ernie_image": Transformer((("ErnieImageTransformer2DModel", {}),), (3072,)),
    "fibo2": Transformer((("BriaFibo2Transformer2DModel", {}),), (3584,)),
}


def shapes_of(transformer: Transformer) -> dict[str, list[int]]:
    """Name -> the weight's shape, of every module with a weight, norms and embeddings too."""
    import diffusers

    found: dict[str, list[int]] = {}
    for name, config in transformer.classes:
        with torch.device("meta"):
            model = getattr(diffusers, name)(**config)
        for module, child in model.named_modules():
            weight = getattr(child, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim():
                found.setdefault(module, list(weight.shape))
    return found


def counted(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The names of equal blocks as one, "blocks.{40}.norm"; blocks that differ, or are not numbered from 0, by name."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, str]]] = {}
    alone: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if at is None:
            alone[name] = shape
            continue
        pattern = ".".join("{}" if i == at else part for i, part in enumerate(parts))
        groups.setdefault((pattern, tuple(shape)), []).append((int(parts[at]), name))
    found = dict(alone)
    for (pattern, shape), members in groups.items():
        numbers = sorted(number for number, _ in members)
        if numbers == list(range(len(numbers))):
            found[pattern.replace("{}", f"{{{len(numbers)}}}")] = list(shape)
        else:
            found |= {name: list(shape) for _, name in members}
    return found


def originals(listed: dict[str, list[int]], transformer: Transformer) -> dict[str, list[str]]:
    """The original code's name -> diffusers' modules, in counted form; nothing where all names are the same."""
    count = {re.sub(r"\{\d+\}", "{}", name): name for name in listed}
    found: dict[str, list[str]] = {}
    for name, modules in transformer.fused.items():
        counts = [count[module] for module in modules]
        number = re.search(r"\{\d+\}", counts[0])
        found[name.replace("{}", number[0] if number else "{}")] = counts
    taken = {module for modules in found.values() for module in modules}
    for name in listed:
        if name in taken:
            continue
        theirs = name
        for pattern, new in transformer.renames:
            theirs = re.sub(pattern, new, theirs)
        assert theirs not in found, f"{theirs} is {found[theirs]} and {name}"
        found[theirs] = [name]
    return found if any(modules != [name] for name, modules in found.items()) else {}
