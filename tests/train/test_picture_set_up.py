"""What a run on pictures reads, encodes and checks before its first step."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest
import tiny_pictures
import tiny_pipelines
from PIL import Image

from lorakit.errors import ConfigError, LorakitWarning
from lorakit.tasks.image.prompts import encoding_of
from lorakit.train.progress import Progress
from lorakit.train.setup import set_up
from lorakit.train.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pictures.save_pipeline(tmp_path_factory.mktemp("tiny") / "sd1")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    tiny_pipelines.tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    return tiny_pictures.write_pictures(tmp_path / "pictures", 4)


@pytest.fixture
def make(model, pictures, tmp_path):
    """`make(**changes)`: a short run's config."""
    places = {"model": model, "data": pictures, "out": tmp_path / "run"}
    return lambda **changes: tiny_pictures.config(**places | changes)


# ------------------------------------------------------------------------------------- validation pictures


def test_validation_pictures_need_no_masks_and_no_folder_of_repeats(make, pictures, tmp_path):
    (pictures / "often").mkdir()
    for path in pictures.glob("00.*"):
        shutil.copy(path, pictures / "often")
    masks = tmp_path / "masks"
    for path in pictures.rglob("*.png"):
        mask = masks / path.relative_to(pictures)
        mask.parent.mkdir(exist_ok=True, parents=True)
        with Image.open(path) as image:
            Image.new("L", image.size, 255).save(mask)
    validation = tiny_pictures.write_pictures(tmp_path / "other", 2, seed=5)
    job = set_up(make(mask=str(masks), repeats={"often": 3}, validation=str(validation)))
    assert len(job.train) == 4 + 3
    assert [Path(row.where).parent for row in job.held_out] == [validation] * 2
    assert all(row.item.mask is not None for row in job.train)
    assert all(row.item.mask is None for row in job.held_out)


def test_a_validation_folder_inside_the_training_folder_is_not_trained_on(make, pictures):
    validation = tiny_pictures.write_pictures(pictures / "val", 2, seed=5)
    job = set_up(make(validation=str(validation)))
    assert {Path(row.where).parent for row in job.train} == {pictures}
    assert {Path(row.where).parent for row in job.held_out} == {validation}


def test_a_training_folder_inside_the_validation_folder_is_not_evaluated_on(make, tmp_path):
    outer = tiny_pictures.write_pictures(tmp_path / "outer", 2, seed=5)
    inner = tiny_pictures.write_pictures(outer / "inner", 3, seed=6)
    job = set_up(make(data=inner, validation=str(outer)))
    assert {Path(row.where).parent for row in job.held_out} == {outer}


def test_validation_pictures_that_are_trained_on_too_are_said(make, pictures, tmp_path):
    validation = tiny_pictures.write_pictures(tmp_path / "other", 2, seed=5)
    shutil.copy(pictures / "01.png", validation / "01.png")
    job = set_up(make(validation=str(validation)))
    assert job.data.notes[f"in {validation}, and among the training pictures as well"] == 1


def test_the_training_pictures_are_no_validation_pictures(make, pictures):
    with pytest.raises(ConfigError, match=f"validation: {pictures}/ is the training data itself"):
        set_up(make(validation=f"{pictures}/"))


# ------------------------------------------------------------------------------------- SDXL's sizes


@pytest.mark.parametrize("components", [["unet"], ["unet", "text_encoder"]])
def test_sdxl_is_given_the_size_of_the_file_and_the_crop_of_the_scaled_picture(make, sdxl, tmp_path, components):
    data = tiny_pictures.write_pictures(tmp_path / "wide", 2, ((64, 32),))
    job = set_up(make(model=sdxl, data=data, resolution=16, buckets=False, components=components))
    prompts = job.task.collate(job.train, job.base)["prompts"]
    sizes = {name: value for name, value in prompts.items() if name.endswith(("_size", "_left"))}
    # 64 x 32 is scaled to 32 x 16, of which the middle 16 x 16 are kept.
    assert sizes == {"original_size": (32, 64), "crops_coords_top_left": (0, 8), "target_size": (16, 16)}
    assert ("prompt" in prompts) == ("text_encoder" in components)
    assert job.task.losses(job.model, job.task.collate(job.train, job.base)).shape == (2,)


def test_an_enlarged_picture_keeps_the_size_of_its_file(make, sdxl, tmp_path):
    data = tiny_pictures.write_pictures(tmp_path / "small", 1, ((8, 8),))
    job = set_up(make(model=sdxl, data=data, upscale=True))
    assert job.train[0].group == (16, 16)
    assert job.task.collate(job.train, job.base)["prompts"]["original_size"] == (8, 8)


# ------------------------------------------------------------------------------------- what does not fit the pipeline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_shift": 3.0}, "timestep_shift is for flow matching"),
        ({"max_timestep": 1001}, "timesteps 0 to 1001 are not within the scheduler's 1,000"),
        ({"logit_mean": 0.5}, "logit_mean is for logit-normal timesteps, and with DDIMScheduler auto is uniform"),
    ],
)
def test_settings_that_do_not_fit_the_scheduler_are_refused_before_pictures_are_drawn_and_encoded(
    make, changes, message
):
    config = make(prior_caption="a cat", prior_count=2, **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        set_up(config)
    assert not list(Path(config.out).rglob("*.png"))
    config = make(**changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        set_up(config)
    assert not list(Path(config.out).rglob("*.safetensors"))


def test_a_guidance_that_the_denoiser_is_not_given_is_refused(make):
    with pytest.raises(ConfigError, match="guidance: StableDiffusionPipeline is trained without guidance"):
        set_up(make(guidance=3.5))


def test_a_slider_is_checked_before_its_first_step(make):
    slider = {"data": "none", "slider_positive": "a red cat", "slider_negative": "a dog", "slider_steps": 2}
    with pytest.raises(ConfigError, match="guidance: StableDiffusionPipeline is trained without guidance"):
        set_up(make(**slider, guidance=3.5))
    with pytest.raises(ConfigError, match="timestep_shift is for flow matching"):
        set_up(make(**slider, timestep_shift=3.0))
    with pytest.raises(ConfigError, match=r"resolution: 20 is no multiple of 8, .*\n  for example 16"):
        set_up(make(**slider, resolution=20))
    assert train(make(**slider, resolution=24), Progress(quiet=True)).adapter is not None


# ------------------------------------------------------------------------------------- captions


def test_captions_that_a_text_encoder_cuts_are_said_once(make, pictures):
    for number in (1, 2):
        (pictures / f"0{number}.txt").write_text("a red cat " * 10 + str(number))
    with pytest.warns(LorakitWarning, match=r"text_encoder: the prompt .* the first 16 are read") as caught:
        set_up(make())
    assert len([w for w in caught if "are read" in str(w.message)]) == 1
    assert str(caught[-1].message).endswith("\n  and so for 1 more")


def test_captions_that_are_read_in_full_are_not_warned_of(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorakitWarning)
        set_up(make())


def test_two_pipelines_that_call_one_text_encoder_differently_share_no_embeddings(make, tmp_path):
    """PixArt-alpha reads 120 tokens of a caption and PixArt-sigma 300, with one T5."""
    cache = tmp_path / "shared"
    first = make(cache=str(cache))
    job = set_up(first)
    job.task.collate(job.train, job.base)
    files = {path.name for path in cache.rglob("*.safetensors")}
    pictures = set_up(make(cache=str(cache), out=tmp_path / "second")).base.processor

    class Other(type(pictures.pipe)):
        """Another class with the same components."""

    pictures.pipe.__class__ = Other
    pictures._hashes.clear()
    pictures.prompts(job.train)
    assert len({path.name for path in cache.rglob("*.safetensors")} - files) == len(job.train)


def test_the_device_is_no_part_of_how_captions_are_encoded():
    pipe = tiny_pipelines.tiny_sd1()
    assert "device" not in encoding_of(pipe)
    assert "StableDiffusionPipeline" in encoding_of(pipe)
    assert encoding_of(pipe) == encoding_of(tiny_pipelines.tiny_sd1(seed=1))
