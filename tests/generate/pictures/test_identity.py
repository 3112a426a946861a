"""The hashes that a picture names its model and adapters by."""

from __future__ import annotations

import hashlib

import pytest
import tiny_pipelines
import torch
from safetensors import safe_open

import lorakit as lk
from lorakit.generate.pictures.identity import differences, lora_hash, model_hash, public_source
from lorakit.generate.pictures.png_text import Lora, Parameters


def test_an_adapters_hash_is_that_of_civitai(adapted, tmp_path):
    path = lk.capture(adapted, "ink").save(tmp_path / "ink.safetensors", format="kohya")
    with safe_open(path, "pt") as file:
        stated = file.metadata()["sshs_model_hash"]
    data = path.read_bytes()
    behind_header = data[8 + int.from_bytes(data[:8], "little") :]
    assert lora_hash(str(path)) == stated[:12] == hashlib.sha256(behind_header).hexdigest()[:12]


def test_an_adapter_of_several_values_has_another_hash_than_its_neighbour(adapted, tmp_path):
    hashes = set()
    for name in ("ink", "neon"):
        lk.capture(adapted, name).save(tmp_path / f"{name}.safetensors", format="diffusers")
        hashes.add(lora_hash(str(tmp_path / f"{name}.safetensors")))
    assert len(hashes) == 2


@pytest.mark.parametrize("component, module", [("unet", "conv_out"), ("vae", "decoder.conv_out")])
def test_a_pipelines_hash_changes_with_any_of_its_weights(component, module):
    pipe = tiny_pipelines.tiny_sd1()
    before = model_hash(pipe, "a/folder")
    assert model_hash(tiny_pipelines.tiny_sd1(), "another/folder") == before
    with torch.no_grad():
        getattr(pipe, component).get_submodule(module).bias[0] += 0.01
    assert model_hash(pipe, "a/folder") != before


def test_a_checkpoint_file_has_the_hash_of_a1111(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"any bytes")
    assert model_hash(tiny_pipelines.tiny_sd1(), str(file)) == hashlib.sha256(b"any bytes").hexdigest()[:10]


@pytest.mark.parametrize(
    "source, written",
    [
        ("embedded", "embedded"),
        ("owner/name", "owner/name"),
        ("runs/ink", "runs/ink"),
        ("/home/me/ink", None),
        ("~/ink", None),
        ("../me/ink", None),
    ],
)
def test_no_folder_of_the_user_is_written(source, written):
    assert public_source(source) == written


def test_what_differs_is_named():
    made = Parameters("a", model="one", model_hash="11", loras={"ink": Lora(hash="aa"), "neon": Lora()})
    assert differences(made, "one", "11", {"ink": Lora(hash="aa"), "neon": Lora(hash="bb")}) == []
    lines = differences(made, "two", "22", {"ink": Lora(hash="cc")})
    assert lines == [
        "the model: it was made with one (11), this is two (22)",
        "an adapter: 'ink' has the hash cc, and was aa when it was made",
        "an adapter: it was made with 'neon', which is not given: --adapter neon=PATH",
    ]
    assert differences(Parameters("a"), "two", "22", {}) == [], "nothing is known"
