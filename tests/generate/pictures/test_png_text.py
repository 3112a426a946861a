"""A1111's text: what other programs have written is read, and what is written is read back to the same parameters."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorakit.errors import DataError
from lorakit.generate.pictures.png_text import Lora, Parameters, from_text, png_text, read_png, to_text

# As the web UI writes it, version 1.10.
A1111 = """masterpiece, (portrait:1.2) of a woman, <lora:epiNoise:0.6> soft light <lora:film grain:1:0.4>
second line
Negative prompt: lowres, bad hands,
(worst quality:1.4)
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 965400086, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse.safetensors, \
Clip skip: 2, ENSD: 31337, Lora hashes: "epiNoise: 98d2d5d7a4b1, film grain: 0a1b2c3d4e5f", \
ControlNet 0: "Module: canny, Model: control [d14c016b], Weight: 1", Version: v1.10.1"""


def test_the_text_of_a1111_is_read():
    p = from_text(A1111)
    assert p.prompt == "masterpiece, (portrait:1.2) of a woman, soft light\nsecond line"
    assert p.negative == "lowres, bad hands,\n(worst quality:1.4)"
    assert (p.steps, p.sampler, p.schedule, p.guidance, p.seed) == (28, "DPM++ 2M", "Karras", 6.5, 965400086)
    assert (p.width, p.height, p.model, p.model_hash) == (512, 768, "v1-5-pruned-emaonly", "6ce0161689")
    assert p.loras == {
        "epiNoise": Lora(0.6, {}, "98d2d5d7a4b1"),
        "film grain": Lora(1.0, {"text_encoder": 1.0, "unet": 0.4}, "0a1b2c3d4e5f"),
    }
    assert p.arguments == {"clip_skip": 1}, "diffusers counts from the layer before the last"
    assert p.others["ControlNet 0"] == "Module: canny, Model: control [d14c016b], Weight: 1"
    assert p.version == "v1.10.1"


@pytest.mark.parametrize(
    "tag, lora",
    [
        ("<lora:a>", Lora(1.0)),
        ("<lora:a:0.5>", Lora(0.5)),
        ("<lora:a:-1>", Lora(-1.0)),
        ("<lora:a:0:0.7>", Lora(1.0, {"text_encoder": 0.0, "unet": 0.7})),
        ("<lora:a:te=0:unet=0.7>", Lora(1.0, {"text_encoder": 0.0, "unet": 0.7})),
        ("<lora:a:unet=0.7>", Lora(1.0, {"text_encoder": 1.0, "unet": 0.7})),
        ("<lora:a:0.5:0.5:dyn=8>", Lora(0.5)),
    ],
)
def test_the_weights_of_a_tag_are_those_of_a1111(tag, lora):
    p = from_text(f"a cat {tag}\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512")
    assert p.prompt == "a cat"
    assert p.loras == {"a": lora}


def test_the_text_written_is_what_a1111_and_sites_expect():
    p = Parameters(
        prompt="a panda in a meadow",
        negative="a house",
        steps=20,
        sampler="DDIM",
        guidance=3.0,
        seed=7,
        width=32,
        height=48,
        model="tiny-diffusion",
        model_hash="52cb1234a0",
        loras={"ink": Lora(0.7, {}, "6f0b9b0c2e1d"), "neon": Lora(0.5, {"text_encoder": 0.0}, "aaaaaaaaaaaa")},
        version="lorakit 0.1.0",
    )
    prompt, negative, fields = to_text(p).split("\n")
    assert prompt == "a panda in a meadow <lora:ink:0.7> <lora:neon:0:0.5>"
    assert negative == "Negative prompt: a house"
    assert fields.startswith(
        "Steps: 20, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: 32x48, Model hash: 52cb1234a0, Model: tiny-diffusion, "
        'RNG: CPU, Lora hashes: "ink: 6f0b9b0c2e1d, neon: aaaaaaaaaaaa", '
    )
    assert fields.endswith(", Version: lorakit 0.1.0")
    assert from_text(to_text(p)) == p


AWKWARD = st.text(st.sampled_from('ab ,:"\\\n<>()-注é'), max_size=20) | st.sampled_from(
    ["Negative prompt: x", "Steps: 3, Seed: 1, Size: 1x1", "<lora:a:1>", "a <lora:b", " spaced ", '"', '"quoted"']
)
NAMES = st.text(st.sampled_from("ab_- ."), min_size=1, max_size=6).filter(lambda n: n == n.strip())
WEIGHTS = st.floats(-4, 4, allow_nan=False)


@example(Parameters(prompt="", steps=1, loras={"a": Lora(0.0, {"unet": 0.0})}))
@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Parameters,
        prompt=AWKWARD,
        negative=AWKWARD,
        steps=st.integers(1, 99),
        sampler=st.sampled_from(["Euler a", "DPM++ 2M"]),
        guidance=st.floats(0, 30),
        seed=st.integers(0, 2**63 - 1),
        width=st.integers(1, 9999),
        height=st.integers(1, 9999),
        model=AWKWARD.map(lambda t: t.strip() or None),
        loras=st.dictionaries(
            NAMES,
            st.builds(
                Lora,
                weight=WEIGHTS,
                parts=st.dictionaries(st.sampled_from(["unet", "text_encoder", "unet.mid_block"]), WEIGHTS),
                hash=st.none() | st.text(st.sampled_from("0123456789abcdef"), min_size=12, max_size=12),
                source=st.none() | AWKWARD.filter(bool),
            ),
            max_size=3,
        ),
        arguments=st.dictionaries(st.sampled_from(["clip_skip", "guidance_rescale"]), WEIGHTS),
        precision=st.sampled_from([None, "fp32"]),
        libraries=st.sampled_from([None, "diffusers 0.42.1, torch 2.13.0"]),
    )
)
def test_every_text_comes_back_as_it_was(parameters):
    assert from_text(to_text(parameters)) == parameters


def test_it_is_in_the_png_where_a1111_has_it(tmp_path):
    p = Parameters(prompt="ein Bär, 熊", steps=20, seed=7)
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=png_text(p))
    with Image.open(path) as image:
        assert image.text["parameters"] == to_text(p)
    assert read_png(path) == p


@pytest.mark.parametrize(
    "text, message",
    [
        ("just words", "no generation parameters"),
        ("", "no generation parameters"),
        ("a\nSteps: many, Seed: 1", "'Steps: many' is not a whole number"),
        ("a\nSteps: 1e999, Seed: 1", "is not a whole number"),
        ("a\nSteps: 20, CFG scale: 1.0e999", "is not a number"),
        ('a\nSteps: 20, Lora weights: "{\\"a\\": {}}", Seed: 1', None),
        ('a <lora:a:1>\nSteps: 20, Lora weights: "{\\"a\\": 3}", Seed: 1', "'Lora weights' is damaged"),
        ('a\nSteps: 20, Arguments: "[1]", Seed: 1', "'Arguments' is damaged"),
        ('a\nSteps: 20, Prompt: "{", Seed: 1', "'Prompt' is damaged"),
    ],
)
def test_damaged_texts_are_named(text, message):
    if message is None:
        assert from_text(text).steps == 20
    else:
        with pytest.raises(DataError, match=message):
            from_text(text, "x.png")


def test_long_nonsense_is_refused_quickly():
    for text in ("<lora:" * 20_000, "a " * 50_000, 'Steps: "' + "\\" * 100_001, "," * 100_000, "Steps:" + " " * 99_999):
        try:
            from_text(text)
        except DataError:
            continue


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nbroken"), "cannot read"),
        (lambda path: path.write_text("<!doctype html><p>not found"), "a web page"),
        (lambda path: Image.new("RGB", (8, 8)).save(path, "JPEG"), "is a JPEG picture"),
        (lambda path: Image.new("RGB", (8, 8)).save(path), "holds no generation parameters"),
    ],
)
def test_files_without_the_text_are_named(tmp_path, make, message):
    path = tmp_path / "x.png"
    make(path)
    with pytest.raises(DataError, match=message):
        read_png(path)


def test_a_workflow_of_comfyui_is_said_to_be_one(tmp_path):
    info = PngInfo()
    info.add_text("workflow", json.dumps({"nodes": []}))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(DataError, match="a workflow of ComfyUI"):
        read_png(tmp_path / "x.png")
