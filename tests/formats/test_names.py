"""The stored module names against diffusers' own checkpoint converters and classes."""

from __future__ import annotations

import pytest
import torch

from lorakit.formats import kohya, names

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
CLASSES = {
    "sd3": ["SD3Transformer2DModel"],
    "flux": ["FluxTransformer2DModel", "FluxPipeline"],
    "flux2": ["Flux2Transformer2DModel", "Flux2Pipeline"],
    "chroma": ["ChromaTransformer2DModel"],
    "qwen_image": ["QwenImageTransformer2DModel", "QwenImagePipeline"],
    "z_image": ["ZImageTransformer2DModel", "ZImagePipeline"],
    "wan": ["WanTransformer3DModel", "WanPipeline"],
    "hunyuan_video": ["HunyuanVideoTransformer3DModel"],
    "ltx": ["LTXVideoTransformer3DModel"],
    "lumina2": ["Lumina2Transformer2DModel"],
}


def ldm_weights(model: str, shape_of) -> dict[str, torch.Tensor]:
    """A different small weight for each ldm name of the denoiser."""
    generator = torch.Generator().manual_seed(0)
    listed = names.module_list(model)["ldm"]
    return {name: torch.randn(shape_of(name), generator=generator) for name in listed}


def read_as_diffs(weights: dict[str, torch.Tensor]):
    flat = {f"lora_unet_{name.replace('.', '_')}.diff": weight for name, weight in weights.items()}
    return kohya.read("made.safetensors", flat, {})


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_ldm_names_of_a_unet_are_those_of_diffusers_converter(model):
    weights = ldm_weights(model, lambda name: (2, 2))
    checkpoint = {f"{name}.{kind}": w for name, w in weights.items() for kind in ("weight", "bias")}
    config = {
        "layers_per_block": 2,
        "class_embed_type": None,
        "addition_embed_type": "text_time" if model == "sdxl" else None,
    }
    theirs = single_file.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{k}": v for k, v in checkpoint.items()}, config
    )
    ours = {modules[0]: weights[name] for name, modules in names.module_list(model)["ldm"].items()}
    assert set(ours) == {key.removesuffix(".weight") for key in theirs if key.endswith(".weight")}
    assert all(theirs[f"{module}.weight"] is weight for module, weight in ours.items())


def test_fused_sd3_weights_are_taken_apart_as_diffusers_converter_does():
    """Medium's 24 blocks, the last of which gives its context a shift and a scale only."""
    width = 4
    rows = {"qkv": 3 * width, "fc1": 4 * width, "adaLN_modulation.1": 6 * width}

    def shape(name: str) -> tuple[int, ...]:
        if name == "x_embedder.proj":
            return width, width, 2, 2
        if name.startswith("final_layer.adaLN") or name == "joint_blocks.23.context_block.adaLN_modulation.1":
            return 2 * width, width
        return next((r for ending, r in rows.items() if name.endswith(ending)), width), 4 * width if name.endswith(
            "fc2"
        ) else width

    absent = ("attn.proj", "mlp.fc1", "mlp.fc2")
    weights = {
        name: weight
        for name, weight in ldm_weights("sd3", shape).items()
        if not (name.startswith("joint_blocks.") and int(name.split(".")[1]) > 23)
        and not (name.startswith("joint_blocks.23.context_block") and name.endswith(absent))
    }
    checkpoint = {f"{name}.weight": w for name, w in weights.items()} | {
        f"{name}.bias": w[:, 0] for name, w in weights.items()
    }
    theirs = single_file.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint | {"pos_embed": torch.zeros(1)})
    ours = read_as_diffs(weights)
    assert ours.metadata["model"] == "sd3"
    theirs = {key.removesuffix(".weight"): w for key, w in theirs.items() if key.endswith(".weight")}
    assert set(theirs) == {module.removeprefix("transformer.") for module in ours.updates}
    for module, update in ours.updates.items():
        assert torch.equal(update.weight, theirs[module.removeprefix("transformer.")]), module


def test_fused_flux_weights_are_taken_apart_as_diffusers_converter_does():
    width = 4
    rows = {
        "qkv": 3 * width,
        "mlp.0": 4 * width,
        "mod.lin": 6 * width,
        "modulation.lin": 3 * width,
        "adaLN_modulation.1": 2 * width,
    }

    def shape(name: str) -> tuple[int, int]:
        return 21504 if name.endswith("linear1") else next(
            (r for end, r in rows.items() if name.endswith(end)), width
        ), width

    weights = {
        n: w for n, w in ldm_weights("flux", shape).items() if "single_blocks" not in n or int(n.split(".")[1]) < 3
    }
    checkpoint = {f"{name}.weight": w for name, w in weights.items()} | {
        f"{name}.bias": w[:, 0] for name, w in weights.items()
    }
    for block in range(19):
        for side in ("img", "txt"):
            checkpoint |= {
                f"double_blocks.{block}.{side}_attn.norm.{x}_norm.scale": torch.zeros(1) for x in ("query", "key")
            }
    for block in range(3):
        checkpoint |= {f"single_blocks.{block}.norm.{x}_norm.scale": torch.zeros(1) for x in ("query", "key")}
    theirs = single_file.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    theirs = {
        k.removesuffix(".weight"): w
        for k, w in theirs.items()
        if k.endswith(".weight") and "norm_" not in k.rsplit(".", 2)[1]
    }
    ours = read_as_diffs(weights)
    assert ours.metadata["model"] == "flux"
    assert set(theirs) == {module.removeprefix("transformer.") for module in ours.updates}
    for module, update in ours.updates.items():
        assert torch.equal(update.weight, theirs[module.removeprefix("transformer.")]), module


@pytest.mark.parametrize("model", names.MODELS)
def test_no_two_modules_share_a_key_and_every_written_key_is_read_back_as_its_modules(model):
    places, known = names.places(model), names.modules_of(model)
    for module, place in places.items():
        assert known[place.key] == place.modules
        assert module in place.modules
    listed = [n for part in names.PIPELINES[model].values() for n in names.module_list(part.listed)["modules"]]
    for part in names.PIPELINES[model].values():
        own = names.module_list(part.listed)["modules"]
        assert len({name.replace(".", "_") for name in own}) == len(own)
    assert len(listed) == len(names.shapes(model))


@pytest.mark.parametrize(
    "model, key, module",
    [
        (
            "sd1",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        ("sd1", "lora_te_text_model_encoder_layers_11_mlp_fc2", "text_encoder.text_model.encoder.layers.11.mlp.fc2"),
        (
            "sdxl",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        (
            "sdxl",
            "lora_te2_text_model_encoder_layers_31_self_attn_k_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.k_proj",
        ),
        (
            "sd3",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        ),
        (
            "flux",
            "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0",
            "text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wi_0",
        ),
    ],
)
def test_keys_as_kohya_writes_them(model, key, module):
    assert names.places(model)[module].key == key


def test_counts_of_kohyas_default_modules():
    """As its trainer reports them: attention and feed-forward of the UNet, of the text encoders' layers."""

    def default(model: str, component: str) -> int:
        return sum(
            len(shape) > 1
            and name.startswith(f"{component}.")
            and any(p in name for p in (".attentions.", ".encoder.layers."))
            for name, shape in names.shapes(model).items()
        )

    assert (default("sd1", "unet"), default("sd1", "text_encoder")) == (192, 72)
    assert [default("sdxl", c) for c in ("unet", "text_encoder", "text_encoder_2")] == [722, 72, 192]


def test_the_model_is_told_from_names_then_from_widths():
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert names.model_of(["unet.down_blocks.0.attentions.0.proj_in"]) == "sd1"
    assert names.model_of(["unet.down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2"]) == "sdxl"
    assert (
        names.model_of(
            ["transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.proj_mlp"]
        )
        == "flux"
    )
    assert names.model_of(["transformer.transformer_blocks.23.ff.net.2"]) == "sd3"
    assert names.model_of(["text_encoder.text_model.encoder.layers.22.mlp.fc1"]) == "sd2"
    for model, width in (("sd1", 768), ("sd2", 1024), ("sdxl", 2048)):
        assert names.model_of([attention], {attention: (1280, width)}) == model
    assert names.model_of(["model.layers.0.self_attn.q_proj"]) is None
    assert names.model_of([]) is None


@pytest.mark.parametrize("model, classes", CLASSES.items())
def test_a_denoisers_or_pipelines_class_tells_the_model(model, classes):
    import diffusers

    for name in classes:
        assert hasattr(diffusers, name)
        assert names.model_of_class(name) == names.model_of_class(f"{name} + CLIPTextModel") == model


def test_other_classes_tell_nothing():
    # Stable Diffusion 1 and 2 have one class.
    unets = ("UNet2DConditionModel + CLIPTextModel", "StableDiffusionPipeline")
    for name in (*unets, "LlamaForCausalLM", "", "PipelineModel"):
        assert names.model_of_class(name) is None
