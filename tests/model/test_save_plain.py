"""save_pretrained of a pipeline and of a diffusers model with adapters attached."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import draw, tiny_sd1, trained

import lorakit as lk
from lorakit.errors import StateError


@pytest.fixture
def pipe():
    made = tiny_sd1()
    trained(made, components=["unet", "text_encoder"], targets="locon", save_modules=["conv_in"])
    return made


def tensors(folder) -> list[str]:
    return [key for file in folder.rglob("*.safetensors") for key in load_file(file)]


def test_with_adapters_it_is_an_error_before_anything_is_written(pipe, tmp_path):
    for saver in (pipe, pipe.unet, pipe.text_encoder):
        with pytest.raises(StateError, match=r"with adapters attached.*\n.*lorakit.capture.*merge.*detach"):
            saver.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    lk.activate(pipe, None)
    with pytest.raises(StateError, match="with adapters attached"):
        pipe.save_pretrained(tmp_path / "out")


def test_a_merged_pipeline_is_saved_as_the_plain_pipeline_it_is(pipe, tmp_path):
    lk.merge(pipe)
    ours = draw(pipe)
    pipe.save_pretrained(tmp_path / "out")
    assert not [key for key in tensors(tmp_path / "out") if "lora" in key]
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert torch.equal(draw(loaded), ours)
    pipe.unet.save_pretrained(tmp_path / "unet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(unet.conv_in.weight, pipe.unet.conv_in.weight)
    lk.unmerge(pipe)
    lk.detach(pipe)
    pipe.save_pretrained(tmp_path / "plain")
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "plain", safety_checker=None)
    assert torch.equal(draw(plain), draw(tiny_sd1()))


def test_a_component_whose_adapter_is_not_in_use_belongs_to_the_merged_pipeline(pipe, tmp_path):
    trained(pipe, "unet only")
    lk.merge(pipe)
    pipe.save_pretrained(tmp_path / "out")
    assert not [key for key in tensors(tmp_path / "out") if "lora" in key]
    with pytest.raises(StateError, match="of a CLIPTextModel with adapters attached"):
        pipe.text_encoder.save_pretrained(tmp_path / "words")


def test_the_variant_and_the_size_of_files_are_passed_on(pipe, tmp_path):
    lk.merge(pipe)
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    names = {file.name for file in (tmp_path / "unet").iterdir()}
    assert any(name.endswith(".safetensors") and "fp16" in name and "00001-of" in name for name in names)


def test_a_unet_alone(tmp_path):
    unet = tiny_sd1().unet
    lk.attach(unet, lk.LoraConfig(rank=2, targets="attention"))
    with pytest.raises(StateError, match="of a UNet2DConditionModel with adapters attached"):
        unet.save_pretrained(tmp_path / "out")
    lk.detach(unet)
    unet.save_pretrained(tmp_path / "out")
    assert not [key for key in tensors(tmp_path / "out") if "lora" in key]
