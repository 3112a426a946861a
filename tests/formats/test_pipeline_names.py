"""Full names in every file: the component in front, and CLIP's level `text_model` whatever transformers calls it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.formats.pipeline_names import in_pipeline

LAYER = "encoder.layers.0.mlp.fc1"


def adapter(*modules: str) -> lk.Adapter:
    update = lk.Factors(torch.ones(2, 8), torch.ones(8, 2), 2.0)
    return lk.Adapter(lk.LoraConfig(rank=2, alpha=2), dict.fromkeys(modules, update))


def test_only_clips_layers_get_the_level():
    others = (
        "text_encoder_2.text_projection",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        "unet.conv_in",
    )
    found = in_pipeline(adapter(f"text_encoder.{LAYER}", f"text_encoder_2.text_model.{LAYER}", *others))
    named = (f"text_encoder.text_model.{LAYER}", f"text_encoder_2.text_model.{LAYER}", *others)
    assert tuple(found.updates) == named
    plain = adapter("model.encoder.layers.0.mlp.fc1", f"encoder.{LAYER}")  # a language model's
    assert in_pipeline(plain) is plain


def test_two_names_of_one_module_are_refused():
    with pytest.raises(AdapterError, match="two names of one module\n  keep one"):
        in_pipeline(adapter(f"text_encoder.{LAYER}", f"text_encoder.text_model.{LAYER}"))


@pytest.mark.parametrize(
    "format, key",
    [
        ("kohya", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
        ("comfyui", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
        ("diffusers", f"text_encoder.text_model.{LAYER}.lora_linear_layer.down.weight"),
    ],
)
def test_each_format_writes_it(format, key, tmp_path):
    path = adapter(f"text_encoder.{LAYER}").save(tmp_path / "x.safetensors", format)
    assert key in load_file(path)
    assert list(lk.Adapter.load(path).updates) == [f"text_encoder.text_model.{LAYER}"]


UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PARTS = {  # class of the base -> (its own name of a module, the full name)
    "UNet2DConditionModel": (UNET, f"unet.{UNET}"),
    "CLIPTextModel": (LAYER, f"text_encoder.text_model.{LAYER}"),
    "FluxTransformer2DModel": (
        "single_transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.0.attn.to_q",
    ),
    "WanTransformer3DModel": ("blocks.0.attn1.to_q", "transformer.blocks.0.attn1.to_q"),
    "ZImageTransformer2DModel": ("layers.0.attention.to_q", "transformer.layers.0.attention.to_q"),
}


@pytest.mark.parametrize("architecture", PARTS)
@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfyui"])
def test_a_part_of_a_pipeline_gets_its_component(architecture, format, tmp_path):
    own, full = PARTS[architecture]
    value = replace(adapter(own), metadata={"fingerprint": {"architecture": architecture}})
    again = lk.Adapter.load(value.save(tmp_path / "x.safetensors", format))
    assert list(again.updates) == [full]


def test_without_a_fingerprint_only_unmistakable_names_tell():
    assert list(in_pipeline(adapter(UNET)).updates) == [f"unet.{UNET}"]
    for module in (LAYER, "model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_attn", "layers.0.attention.to_q"):
        plain = adapter(module)
        assert in_pipeline(plain) is plain
    language = replace(adapter("layers.0.mlp.up_proj"), metadata={"fingerprint": {"architecture": "LlamaModel"}})
    assert in_pipeline(language) is language
    damaged = replace(adapter(UNET), metadata={"fingerprint": {"architecture": 5}})
    assert list(in_pipeline(damaged).updates) == [f"unet.{UNET}"]


def test_an_adapter_of_a_live_unet_alone_is_written_and_drawn_with_by_diffusers(tmp_path):
    from tiny_pipelines import draw, tiny_sd1

    pipe = tiny_sd1()
    lk.attach(pipe.unet, lk.LoraConfig(rank=2, alpha=3, targets="kohya"))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).reshape(parameter.shape))
    ours = draw(pipe)
    for format in ("kohya", "diffusers"):
        lk.capture(pipe.unet).save(tmp_path / f"{format}.safetensors", format)
        theirs = tiny_sd1()
        theirs.load_lora_weights(str(tmp_path), weight_name=f"{format}.safetensors")
        torch.testing.assert_close(draw(theirs), ours, atol=1e-5, rtol=0)
    assert (ours - draw(tiny_sd1())).abs().max() > 1e-3
