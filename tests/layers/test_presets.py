"""`attention`, `kohya` and `locon`: found by what modules are, in every family, as kohya's trainer has them."""

from __future__ import annotations

import re

import diffusers
import pytest
import tiny
import torch
from tiny_pipelines import sd1_unet, text_encoder, tokenizer
from transformers import CLIPTextModelWithProjection

import lorakit as lk
from lorakit.errors import TargetError
from lorakit.formats.names import shapes
from lorakit.layers.targets import find_targets

SD1 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}


def chosen(model, targets: str) -> list[str]:
    return list(find_targets(model, lk.LoraConfig(targets=targets)).modules)


def endings(names: list[str]) -> set[str]:
    """Names without the numbers of blocks."""
    return {re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names}


@pytest.mark.parametrize(
    ("model", "config", "kohya", "locon"), [("sd1", SD1, 192, 278), ("sdxl", SDXL, 722, 788)], ids=["sd1", "sdxl"]
)
def test_published_unets_have_as_many_as_with_kohyas_trainer(model, config, kohya, locon):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    names = {preset: set(chosen(unet, preset)) for preset in ("attention", "kohya", "locon")}
    assert [len(names[preset]) for preset in ("kohya", "locon")] == [kohya, locon]
    assert names["attention"] < names["kohya"] < names["locon"]
    # by the rules of kohya's trainer, on diffusers' names
    attn_or_ff = r".*\.transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
    assert names["attention"] == {n for n, _ in unet.named_modules() if re.fullmatch(attn_or_ff, n) and ".ff." not in n}
    assert names["kohya"] == {
        n for n, _ in unet.named_modules() if re.fullmatch(attn_or_ff + r"|.*attentions\.\d+\.proj_(in|out)", n)
    }
    assert {n.rsplit(".", 1)[-1] for n in names["locon"] - names["kohya"]} == {
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv")
    }
    assert all(f"unet.{n}" in shapes(model) for n in names["locon"])  # every one has a name in a kohya file


def test_text_encoders():
    words = tokenizer()
    for kind, level in ((None, ""), (CLIPTextModelWithProjection, "text_model.")):
        model = text_encoder(words, kind) if kind else text_encoder(words)
        layer = f"{level}encoder.layers.*"
        attention = {f"{layer}.self_attn.{n}_proj" for n in ("q", "k", "v", "out")}
        assert endings(chosen(model, "attention")) == attention
        assert (
            endings(chosen(model, "kohya"))
            == endings(chosen(model, "locon"))
            == {*attention, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"}
        )
    t5 = endings(chosen(tiny.t5().encoder, "kohya"))
    assert {n.rsplit(".", 1)[-1] for n in t5} == {"q", "k", "v", "o", "wi", "wo"}


FLUX = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
JOINT = {
    f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
}
TRANSFORMERS = {
    "flux": (
        lambda: diffusers.FluxTransformer2DModel(
            **FLUX, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)
        ),
        {*(f"transformer_blocks.*.{n}" for n in JOINT), *(f"single_transformer_blocks.*.attn.to_{n}" for n in "qkv")},
        {
            *(f"transformer_blocks.*.{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("*.proj", "2")),
            *(f"single_transformer_blocks.*.{n}" for n in ("proj_mlp", "proj_out")),
        },
    ),
    "flux2": (
        lambda: diffusers.Flux2Transformer2DModel(**FLUX, joint_attention_dim=32, axes_dims_rope=[4, 4, 4, 4]),
        {
            *(f"transformer_blocks.*.{n}" for n in JOINT),
            *(f"single_transformer_blocks.*.attn.{n}" for n in ("to_qkv_mlp_proj", "to_out")),
        },
        {f"transformer_blocks.*.{ff}.linear_{n}" for ff in ("ff", "ff_context") for n in ("in", "out")},
    ),
    "qwen": (
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        {f"transformer_blocks.*.{n}" for n in JOINT},
        {f"transformer_blocks.*.{ff}.net.{n}" for ff in ("img_mlp", "txt_mlp") for n in ("*.proj", "2")},
    ),
    "wan": (
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        {f"blocks.*.attn{i}.{n}" for i in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out.0")},
        {f"blocks.*.ffn.net.{n}" for n in ("*.proj", "2")},
    ),
    "z_image": (
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[64, 32, 32],
        ),
        {
            f"{stack}.*.attention.{n}"
            for stack in ("noise_refiner", "context_refiner", "layers")
            for n in ("to_q", "to_k", "to_v", "to_out.0")
        },
        {f"{stack}.*.feed_forward.w{i}" for stack in ("noise_refiner", "context_refiner", "layers") for i in (1, 2, 3)},
    ),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_diffusion_transformers_attention_and_feed_forward_and_no_norm(family):
    make, attention, feed_forward = TRANSFORMERS[family]
    with torch.device("meta"):
        model = make()
    assert endings(chosen(model, "attention")) == attention
    assert endings(chosen(model, "kohya")) == attention | feed_forward
    assert chosen(model, "locon") == chosen(model, "kohya")


def test_language_models_have_attention_too(tiny_llama, tiny_gpt2):
    assert endings(chosen(tiny_llama, "attention")) == {f"model.layers.*.self_attn.{n}_proj" for n in "qkvo"}
    with pytest.raises(TargetError, match="the model has no attention to adapt"):
        chosen(tiny_gpt2, "attention")


def test_all_linear_of_a_unet_says_what_it_is():
    """Every linear: also those of the timestep, not SD1's 1x1 convolutions around the blocks."""
    names = chosen(sd1_unet(), "all-linear")
    assert {"time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"} <= set(names)
    assert not any(name.endswith(("proj_in", "conv1")) for name in names)


def test_a_misspelt_preset_is_answered_with_the_nearest():
    for wrong, right in (
        ("atention", "attention"),
        ("khoya", "kohya"),
        ("lokon", "locon"),
        ("all_linear", "all-linear"),
    ):
        with pytest.raises(TargetError, match=f"did you mean '{right}'"):
            chosen(sd1_unet(), wrong)


def test_presets_can_be_narrowed():
    model = sd1_unet()
    config = lk.LoraConfig(targets="locon", exclude=["time_emb_proj"], rank_pattern={"conv1": 1})
    names = list(find_targets(model, config).modules)
    assert len(names) == len(chosen(model, "locon")) - sum(
        n.endswith("time_emb_proj") for n, _ in model.named_modules()
    )
