"""`lorakit image generate`, on a tiny pipeline's folder with two adapters in files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from adapted_pipelines import with_adapters
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import lorakit as lk
from lorakit.errors import LorakitWarning
from lorakit.generate.pictures.png_text import read_png
from lorakit.model.activate import activate
from lorakit.model.detach import detach

SHORT = ("--steps", "2", "--precision", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `model`, another `other`, and the adapters ink.safetensors and neon.safetensors."""
    folder = tmp_path_factory.mktemp("pictures")
    tiny_pipelines.tiny_sd1(seed=1).save_pretrained(folder / "other")
    pipe = tiny_pipelines.tiny_sd1()
    pipe.save_pretrained(folder / "model")
    with_adapters(pipe)
    for name in ("ink", "neon"):
        lk.capture(pipe, name).save(folder / f"{name}.safetensors", format="kohya")
    return folder


@pytest.fixture
def draw(lorakit, folder, tmp_path, monkeypatch):
    """`draw(*args)` runs the command in an empty folder with links to the model and the adapters."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def call(*args, model="model"):
        return lorakit("image", "generate", *(("--model", model) if model else ()), *args, *SHORT)

    return call


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def furthest(a, b):
    return int(np.abs(pixels(a) - pixels(b)).max())


def test_a_picture_is_the_pipelines_own_and_says_how_it_was_made(draw, tmp_path):
    code, out, err = draw("a red cat", "--seed", "5", "--guidance", "3", "--negative", "a dog")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == (
        "model (StableDiffusionPipeline): 2 steps, guidance 3, 16 x 16 pixels (default), DDIM (default); fp32 on cpu"
    )
    assert out.splitlines()[1] == "pictures/0001-a-red-cat-5.png"
    pipe = tiny_pipelines.tiny_sd1()
    expected = pipe(
        "a red cat",
        negative_prompt="a dog",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    )
    expected.images[0].save(tmp_path / "expected.png")
    assert furthest("pictures/0001-a-red-cat-5.png", "expected.png") == 0
    with Image.open("pictures/0001-a-red-cat-5.png") as image:
        text = image.text["parameters"]
    assert text.startswith(
        "a red cat\nNegative prompt: a dog\nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 5, Size: 16x16"
    )
    assert str(tmp_path) not in text, "no folders of the user"


def test_defaults_are_read_from_the_pipeline_and_said(lorakit, draw):
    code, out, _ = lorakit("image", "generate", "a cat", "--model", "model", "--precision", "fp32")
    assert code == 0
    assert "50 steps (default), guidance 7.5 (default), 16 x 16 pixels (default), DDIM (default)" in out


def test_scales_and_prompts_become_one_labelled_grid(draw):
    code, out, _ = draw("a cat", "a dog", "--adapter", "ink.safetensors:0.8", "--scale", "0", "0.5", "1", "--json")
    assert code == 0
    made = json.loads(out)
    assert [p["adapters"] for p in made["pictures"]] == [{}] * 2 + [{"ink": {"weight": 0.4}}] * 2 + [
        {"ink": {"weight": 0.8}}
    ] * 2
    assert [p["prompt"] for p in made["pictures"]] == ["a cat", "a dog"] * 3
    assert made["grid"] == "pictures/0007-grid.png"
    assert Image.open(made["grid"]).width > 2 * 160
    half = read_png(Path(made["pictures"][2]["file"]))
    assert half.loras["ink"].weight == 0.4
    assert half.loras["ink"].source == "ink.safetensors"
    # Against the library, one by one.
    pipe = tiny_pipelines.tiny_sd1()
    lk.attach(pipe, lk.Adapter.load("ink.safetensors"), name="ink")
    activate(pipe, {"ink": 0.4})
    expected = pipe(
        "a cat", num_inference_steps=2, guidance_scale=7.5, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert np.abs(np.asarray(expected).astype(int) - pixels(made["pictures"][2]["file"])).max() <= 1


def test_parts_of_an_adapter_have_weights(draw):
    draw("a red cat", "--adapter", "neon.safetensors:unet=0,text_encoder=0", "--out", "none.png")
    draw("a red cat", "--adapter", "neon.safetensors:unet=0", "--out", "encoder.png")
    draw("a red cat", "--adapter", "neon.safetensors", "--out", "whole.png")
    draw("a red cat", "--out", "base.png")
    assert furthest("none.png", "base.png") == 0
    assert furthest("encoder.png", "base.png") > 1
    assert furthest("encoder.png", "whole.png") > 1
    code, _, err = draw("a", "--adapter", "neon.safetensors:unett=0")
    assert code == 1
    assert "did you mean 'unet'" in err


def test_new_words_of_a_file_are_read_with_it(draw, tmp_path):
    vectors = torch.randn(2, tiny_pipelines.WIDTH, generator=torch.Generator().manual_seed(0))
    adapter = replace(lk.Adapter.load("ink.safetensors"), embeddings={"<fox>": vectors})
    adapter.save(tmp_path / "fox.safetensors", format="kohya")
    code, out, _ = draw("a <fox>", "--adapter", "fox.safetensors", "--out", "fox.png")
    assert code == 0
    assert "modules, 1 textual-inversion embedding); trigger: <fox>" in out
    assert draw("a <fox>", "--adapter", "ink.safetensors", "--out", "spelled.png")[0] == 0
    assert furthest("fox.png", "spelled.png") > 1
    assert "the same pixels" in draw("--from", "fox.png", "--out", "again.png", model=None)[1]


def test_adapters_are_compared_with_the_base(draw):
    code, out, _ = draw(
        "a cat", "--adapter", "ink.safetensors", "--adapter", "neon.safetensors:0.5", "--grid", "adapter", "--json"
    )
    assert code == 0
    used = [p["adapters"] for p in json.loads(out)["pictures"]]
    assert used == [
        {},
        {"ink": {"weight": 1.0}},
        {"neon": {"weight": 0.5}},
        {"ink": {"weight": 1.0}, "neon": {"weight": 0.5}},
    ]


def test_merged_gives_the_same_pictures(draw):
    adapters = ("--adapter", "ink.safetensors:0.7", "--adapter", "neon.safetensors:0.7")
    assert draw("a cat", "a dog", *adapters, "--out", "live")[0] == 0
    assert draw("a cat", "a dog", *adapters, "--out", "merged", "--merged")[0] == 0
    for name in ("0001-a-cat-0.png", "0002-a-dog-0.png"):
        assert furthest(f"live/{name}", f"merged/{name}") <= 1


@pytest.mark.parametrize("number", [2, 5])
def test_a_picture_is_made_again_from_its_png_alone(draw, number):
    draw(
        'a "red" cat, of <sks>',
        "a dog: on\nthe style",
        "--adapter",
        "ink.safetensors:0.7",
        "--adapter",
        "neon.safetensors:0.5,text_encoder=0",
        "--scale",
        "0,0.5,1",
        "--scheduler",
        "euler a",
        "--negative",
        "the, dog",
        "--argument",
        "guidance_rescale=0.7",
        "--seed",
        "7",
        "--batch-size",
        "1",
    )
    path = next(Path("pictures").glob(f"{number:04d}-*.png"))
    code, out, err = draw("--from", path, "--out", "again.png", model=None)
    assert (code, err) == (0, "")
    assert f"the same pixels as {path}" in out
    assert furthest(path, "again.png") == 0
    assert read_png(path) == read_png(Path("again.png"))


def test_a_picture_from_a_pass_of_several_is_made_again_up_to_rounding(draw):
    adapters = ("--adapter", "ink.safetensors:0.7", "--adapter", "neon.safetensors:0.5")
    made = json.loads(draw("a cat", "a dog", *adapters, "--scale", "0", "0.5", "1", "--json")[1])
    code, out, _ = draw("--from", made["pictures"][5]["file"], "--json", "--out", "again.png", model=None)
    assert code == 0
    assert json.loads(out)["largest_difference"] <= 1


def test_a_picture_of_a1111_is_made_similarly(draw, tmp_path):
    info = PngInfo()
    info.add_text(
        "parameters",
        "a red cat <lora:ink:0.6>\nNegative prompt: a dog\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras, "
        "CFG scale: 4, Seed: 8, Size: 32x16, Clip skip: 1, Version: v1.10.1",
    )
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.warns(LorakitWarning, match="made by another program"):
        code, _, _ = draw("--from", "a.png", "--adapter", "ink.safetensors", "--out", "b.png")
    assert code == 0
    made = read_png(tmp_path / "b.png")
    assert (made.width, made.height, made.seed, made.guidance) == (32, 16, 8, 4.0)
    assert (made.sampler, made.schedule, made.loras["ink"].weight) == ("DPM++ 2M", "Karras", 0.6)
    assert made.arguments == {}, "a clip skip of 1 is no skip"


def test_what_is_changed_from_a_png_is_said(draw):
    draw("a cat", "--out", "a.png")
    code, out, _ = draw("--from", "a.png", "--seed", "9", "--out", "b.png", model=None)
    assert code == 0
    assert "changed from a.png: seed" in out
    assert read_png(Path("b.png")).seed == 9


def test_what_differs_from_a_png_is_an_error_that_names_it(draw, folder, tmp_path):
    draw("a cat", "--adapter", "ink.safetensors", "--out", "a.png")
    code, out, err = draw("--from", "a.png", "--out", "b.png", model="other")
    assert (code, out) == (1, "")
    assert "a.png cannot be made again" in err
    assert "the model: it was made with model (" in err
    assert "--force-base goes on" in err
    assert not (tmp_path / "b.png").exists()
    code, _, err = draw("--from", "a.png", "--adapter", "ink=neon.safetensors", "--out", "b.png")
    assert code == 1
    assert "an adapter: 'ink' has the hash " in err
    (tmp_path / "ink.safetensors").unlink()
    code, _, err = draw("--from", "a.png", "--out", "b.png")
    assert code == 1
    assert "no adapter at 'ink.safetensors'" in err
    code, _, err = draw("--from", "a.png", "--adapter", "ink=neon.safetensors", "--out", "b.png", "--force-base")
    assert code == 0
    assert "will not be the same" in err


def test_an_adapter_is_found_under_another_name_by_its_hash(draw, folder, tmp_path):
    draw("a cat", "--adapter", f"{folder}/ink.safetensors:0.6", "--out", "a.png")
    assert read_png(tmp_path / "a.png").loras["ink"].source is None, "an absolute path is the user's"
    code, _, err = draw("--from", "a.png", "--out", "b.png", model=None)
    assert code == 1
    assert "--adapter ink=PATH" in err
    (tmp_path / "renamed.safetensors").symlink_to(folder / "ink.safetensors")
    code, out, _ = draw("--from", "a.png", "--adapter", "renamed.safetensors", "--out", "b.png")
    assert code == 0
    assert "the same pixels" in out


def test_nothing_is_overwritten(draw, tmp_path):
    draw("a cat")
    before = pixels("pictures/0001-a-cat-0.png")
    code, out, _ = draw("a cat", "--seed", "0", "--guidance", "1")
    assert "pictures/0002-a-cat-0.png" in out
    assert (pixels("pictures/0001-a-cat-0.png") == before).all()
    draw("a cat", "--out", "one.png")
    code, out, err = draw("a dog", "--out", "one.png")
    assert (code, out) == (2, "")
    assert "one.png exists" in err
    assert draw("a dog", "--out", "one.png", "--force")[0] == 0
    assert read_png(tmp_path / "one.png").prompt == "a dog"


def test_several_pictures_in_one_png_are_a_grid(draw, tmp_path):
    code, out, _ = draw("a cat", "--count", "3", "--out", "grid.png")
    assert code == 0
    assert "grid: grid.png" in out
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["grid.png"]
    code, out, _ = draw("a cat", "--count", "2", "--grid", "none")
    assert [line for line in out.splitlines() if "grid" in line] == []


def test_a_cut_prompt_is_said(draw):
    with pytest.warns(LorakitWarning, match="has 17 tokens and the first 16 are read: 'cat' has no effect"):
        assert draw("a cat on the red dog in the style of sks animal of the cat")[0] == 0


@pytest.mark.parametrize(
    "args, code, message",
    [
        ((), 2, "there is no prompt"),
        (("a", "--scale", "x"), 2, "'x' is not a number"),
        (("a", "--scale", "0.5"), 2, "there is no adapter"),
        (("a", "--grid", "adapter"), 2, "compares adapters, and there is none"),
        (("a", "--grid", "scal"), 2, "did you mean 'scale'"),
        (("a", "--adapter", "inc.safetensors"), 1, "did you mean 'ink.safetensors'"),
        (("a", "--adapter", "ink.safetensors:x"), 2, "'x' is no weight"),
        (("a", "--scheduler", "eulr a"), 2, "did you mean 'euler a'"),
        (("a", "--width", "15"), 2, "nearest: 8 or 16"),
        (("a", "--out", "a.jpg"), 2, "written as PNG"),
        (("a", "--argument", "clip_skp=1"), 2, "did you mean 'clip_skip'"),
        (("a", "--model", "modle"), 1, "did you mean 'model'"),
        (("--from", "none.png"), 1, "there is no file none.png"),
        (("--from", "ink.safetensors"), 1, "cannot read"),
        (("a <lora:ink:1>",), 2, "--adapter ink=PATH:1"),
    ],
)
def test_bad_input_is_named(draw, args, code, message, tmp_path):
    got, out, err = draw(*args)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "pictures").exists()


def test_an_adapter_of_another_base_is_refused(draw, folder, tmp_path):
    pipe = tiny_pipelines.tiny_sd1()
    lk.attach(pipe, lk.LoraConfig(rank=2, targets=["to_q"]))
    lk.capture(pipe).save(tmp_path / "peft")
    detach(pipe)
    code, _, err = draw("a", "--adapter", "peft", model="other")
    assert code == 1
    assert "trained on another base" in err
    assert "image generate, lorakit export: --force-base" in err
    assert draw("a", "--adapter", "peft", "--force", model="other")[0] == 1, "--force replaces OUT, and no more"
    assert draw("a", "--adapter", "peft", "--force-base", "--out", "a.png", model="other")[0] == 0
    assert "a.png exists" in draw("a", "--adapter", "peft", "--force-base", "--out", "a.png", model="other")[2]


def test_each_of_the_two_commands_knows_the_others_adapters(draw, lorakit, model, trained):
    code, _, err = draw("a", "--adapter", str(trained))
    assert code == 1
    assert "is no adapter for pictures" in err
    assert "lorakit generate 'your prompt'" in err
    code, _, err = lorakit("generate", "a", "--model", model, "--adapter", "ink.safetensors")
    assert code == 1
    assert "is an adapter for pictures" in err
    assert "lorakit image generate" in err
    code, _, err = lorakit("generate", "a", "--model", "model")
    assert code == 1
    assert "lorakit image generate" in err
