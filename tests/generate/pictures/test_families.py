"""Pictures of nine families of pipelines by the same code: defaults, guidance, and adapters by picture."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_families
import torch
from tiny import randomise_factors

import lorakit as lk
from lorakit.bases.load_pipeline import embedded_pipeline, load_pipeline
from lorakit.bases.pipeline import arguments_of, as_module
from lorakit.generate.pictures.call import Defaults, defaults_of, guidance_argument
from lorakit.generate.pictures.generate import generate_pictures

TEXT = (  # the tokenizers of the others are on the hub
    "sd1",
    "sdxl",
    "sd3",
    "flux",
    "chroma",
    "z_image",
)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "chroma", "flux2", "qwen_image", "z_image", "wan"])
def test_steps_guidance_and_size_are_read_from_the_pipeline(name):
    pipe = getattr(tiny_families, name)().pipe
    own = defaults_of(pipe)
    sizes = {"wan": (832, 480), "z_image": (None, None)} | dict.fromkeys(("sd1", "sdxl", "sd3"), (16, 16))
    assert (own.width, own.height) == sizes.get(name, (256, 256))
    assert own.steps == arguments_of(pipe)["num_inference_steps"].default
    assert guidance_argument(pipe) == ("true_cfg_scale" if name == "qwen_image" else "guidance_scale")
    assert own.guidance == arguments_of(pipe)[guidance_argument(pipe)].default


def test_the_embedded_pipeline_is_drawn_as_its_card_says():
    pipe = load_pipeline("embedded", torch.float32, torch.device("cpu"))
    assert defaults_of(pipe) == Defaults(20, 3.0, 32, 32)
    ours = generate_pictures(pipe, ["a panda in a meadow"], seed=7)[0]
    own = pipe(
        "a panda in a meadow", num_inference_steps=20, guidance_scale=3.0, generator=torch.Generator().manual_seed(7)
    ).images[0]
    assert (np.asarray(own) == np.asarray(ours)).all()
    card = (embedded_pipeline() / "README.md").read_text(encoding="utf8")
    assert "num_inference_steps=20, guidance_scale=3" in card


@pytest.mark.parametrize("name", TEXT)
def test_pictures_are_the_pipelines_own_and_adapters_go_by_picture(name):
    pipe = getattr(tiny_families, name)().pipe
    lk.attach(pipe, lk.LoraConfig(rank=2, targets=["to_q", "to_v"]), name="ink")
    randomise_factors(as_module(pipe), size=0.5)
    prompts = ["a red cat", "a dog", "an animal"]
    size = {"width": 32, "height": 32}
    weights = [None, "ink", {"ink": -0.5}]
    mixed = generate_pictures(pipe, prompts, seed=[1, 2, 3], weights=weights, steps=2, guidance=2.0, **size)
    for prompt, seed, which, picture in zip(prompts, (1, 2, 3), weights, mixed):
        lk.activate(pipe, which)
        call = {"num_inference_steps": 2, "guidance_scale": 2.0, **size}
        own = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
        assert np.abs(np.asarray(own).astype(int) - np.asarray(picture).astype(int)).max() <= 1
