"""The format chosen for an adapter is one that both diffusers and ComfyUI read, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exchange_families import CLOSE, FAMILIES, attached, placed, predict
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapter.loha import Loha
from lorakit.export import image_programs
from lorakit.export.widest import widest_format

CHOSEN = {
    ("sd1", "both"): "kohya",
    ("sdxl", "both"): "kohya",
    ("sd3", "blocks"): "diffusers",
    ("flux", "both"): "diffusers",
    ("flux2", "blocks"): "comfyui",
    ("qwen_image", "blocks"): "comfyui",
    ("z_image", "blocks"): "comfyui",
    ("wan", "blocks"): "comfyui",
}


@pytest.mark.parametrize("model, kind", CHOSEN)
def test_diffusers_and_comfyui_both_read_it(model, kind, tmp_path):
    family = FAMILIES[model]
    pipe = attached(family, kind)
    adapter = lk.capture(pipe)
    assert widest_format(adapter) == CHOSEN[model, kind]
    path = adapter.save(tmp_path / "x.safetensors", widest_format(adapter))
    theirs = family.pipe()
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert placed(theirs) == len(adapter.updates)
    torch.testing.assert_close(predict(family, theirs), predict(family, pipe), atol=CLOSE, rtol=0)
    assert image_programs.placed("comfyui", model, load_file(path)).unread == []


@pytest.mark.parametrize("model", ["flux2", "wan"])
def test_modules_outside_the_blocks_go_to_diffusers_in_its_own_format(model):
    assert widest_format(lk.capture(attached(FAMILIES[model], "mixed"))) == "diffusers"


def test_what_only_kohyas_file_holds_goes_there():
    module = "transformer.transformer_blocks.0.attn.to_q"
    update = lk.Factors(torch.ones(2, 3072), torch.ones(3072, 2), 2.0)
    adapter = lk.Adapter(lk.LoraConfig(rank=2, alpha=2), {module: update}, metadata={"model": "flux"})
    assert widest_format(adapter) == "diffusers"
    assert widest_format(replace(adapter, embeddings={"sks": torch.ones(1, 768)})) == "kohya"
    ones = {"w1a": torch.ones(8, 2), "w1b": torch.ones(2, 8), "w2a": torch.ones(8, 2), "w2b": torch.ones(2, 8)}
    assert widest_format(replace(adapter, updates={module: Loha(**ones, alpha=2.0)})) == "kohya"
    assert widest_format(replace(adapter, updates={"unknown.q": update}, metadata={})) == "diffusers"
