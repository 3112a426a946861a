"""CLIP's level `text_model` in every file, whatever the installed transformers calls its layers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.formats.text_model import with_text_model

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
    found = with_text_model(adapter(f"text_encoder.{LAYER}", f"text_encoder_2.text_model.{LAYER}", *others))
    named = (f"text_encoder.text_model.{LAYER}", f"text_encoder_2.text_model.{LAYER}", *others)
    assert tuple(found.updates) == named
    plain = adapter("model.encoder.layers.0.mlp.fc1", f"encoder.{LAYER}")  # a language model's
    assert with_text_model(plain) is plain


def test_two_names_of_one_module_are_refused():
    with pytest.raises(AdapterError, match="two names of one module\n  keep one"):
        with_text_model(adapter(f"text_encoder.{LAYER}", f"text_encoder.text_model.{LAYER}"))


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
