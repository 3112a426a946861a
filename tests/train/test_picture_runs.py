"""Runs of task text_to_image: they learn, resume exactly after SIGKILL, and their result loads in diffusers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_pictures
import torch
import yaml
from diffusers import StableDiffusionPipeline
from tiny_pipelines import draw

from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pictures.save_pipeline(tmp_path_factory.mktemp("tiny") / "sd1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_pictures.write_pictures(tmp_path_factory.mktemp("pictures"), 7, ((16, 16), (24, 16)))


@pytest.fixture
def make(model, pictures, tmp_path):
    """`make(**changes)`: a short run's config."""
    return lambda **changes: tiny_pictures.config(
        model, changes.pop("data", pictures), changes.pop("out", tmp_path / "run"), **changes
    )


def weights(folder: Path) -> Path:
    return folder / "pytorch_lora_weights.safetensors"


def test_a_run_writes_one_file_that_diffusers_places_wholly_and_draws_the_same_with(make, model):
    config = make(components=["unet", "text_encoder"], steps=6, learning_rate=2e-2)
    result = train(config, QUIET)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe)
    pipe.load_lora_weights(result.adapter)
    placed = [
        name for part in (pipe.unet, pipe.text_encoder) for name, _ in part.named_parameters() if "lora_A" in name
    ]
    written = json.loads((result.adapter / "lorakit.json").read_text())
    assert len(placed) == written["placed"]["unet"] + written["placed"]["text_encoder"] > 0
    theirs = draw(pipe)
    assert not torch.allclose(theirs, before, atol=1e-3)


def test_a_run_killed_twice_at_step_7_of_20_ends_with_the_bits_of_one_that_was_not(make, tmp_path):
    config = partial(
        make,
        steps=20,
        eval_every=5,
        save_every=3,
        components=["unet", "text_encoder"],
        text_encoder_learning_rate=1e-3,
        ema=0.9,
        validation=0.2,
        prior_caption="a cat",
        prior_count=4,
        flip=True,
        caption_dropout=0.3,
        min_snr=5,
        noise_offset=0.05,
    )
    whole, killed = config(out=tmp_path / "whole"), config(out=tmp_path / "killed")
    train(whole, QUIET)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(killed.model_dump()))
    command = [sys.executable, str(Path(__file__).with_name("killed_at_step.py")), str(file), "7", "2"]
    paths = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        command, capture_output=True, text=True, env={**__import__("os").environ, "PYTHONPATH": paths}
    )
    assert json.loads(done.stdout) == [-9, -9, 0], done.stderr
    ours, theirs = RunFolder(whole.out), RunFolder(killed.out)
    for name in ("pytorch_lora_weights.safetensors", "lorakit.json"):
        first, second = ((folder.adapter / name).read_bytes() for folder in (ours, theirs))
        assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest()
    for path in sorted(ours.samples.rglob("*.png")):
        assert path.read_bytes() == (theirs.samples / path.relative_to(ours.samples)).read_bytes()

    def without_time(folder):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in folder.rows()]

    assert without_time(ours) == without_time(theirs)
