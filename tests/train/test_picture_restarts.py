"""Runs on pictures that start over in their folder with other settings, before they had a checkpoint."""

from __future__ import annotations

import shutil

import pytest
import tiny_pictures
from PIL import Image

from lorakit.bases.load_pipeline import load_pipeline
from lorakit.errors import TrainError
from lorakit.tasks.image import encoded
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pictures.save_pipeline(tmp_path_factory.mktemp("tiny") / "sd1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_pictures.write_pictures(tmp_path_factory.mktemp("pictures"), 4)


@pytest.fixture
def make(model, pictures, tmp_path):
    """`make(**changes)`: a short run's config."""
    places = {"model": model, "data": pictures, "out": tmp_path / "run"}
    return lambda **changes: tiny_pictures.config(**places | {"steps": 2, "sample_steps": 1} | changes)


def priors(config):
    """The pictures of the class that a run trains on, and their captions."""
    rows = [row for row in set_up(config).train if row.is_prior]
    return {row.item.content for row in rows}, {row.caption for row in rows}


def test_a_run_that_starts_over_measures_and_draws_the_base_again(make, tmp_path):
    train(make(), QUIET)
    shutil.rmtree(RunFolder(make().out).checkpoints)
    changes = {"max_timestep": 200, "sample_seed": 3}
    again, fresh = make(**changes), make(**changes, out=tmp_path / "fresh")
    for config in (again, fresh):
        train(config, QUIET)
    first, second = RunFolder(again.out), RunFolder(fresh.out)
    assert [row.get("fixed_loss") for row in first.rows()] == [row.get("fixed_loss") for row in second.rows()]
    picture = "step-0/1.png"
    assert (first.samples / picture).read_bytes() == (second.samples / picture).read_bytes()


def test_pictures_of_another_class_number_or_pipeline_are_not_trained_on(make, model, tmp_path):
    own = tmp_path / "run" / "prior"
    own.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(own / "00001.png")  # not ours
    cats, captions = priors(make(prior_caption="a cat", prior_count=3))
    assert len(cats) == 3
    assert captions == {"a cat"}
    dogs, captions = priors(make(prior_caption="a dog", prior_count=3))
    assert captions == {"a dog"}
    assert not cats & dogs
    fewer, _ = priors(make(prior_caption="a cat", prior_count=2))
    assert len(fewer) == 2
    assert fewer < cats
    changed = shutil.copytree(model, tmp_path / "changed")
    pipe = load_pipeline(str(model), encoded.torch.float32, encoded.torch.device("cpu"))
    pipe.unet.conv_out.weight.data.mul_(2)
    pipe.save_pretrained(changed)
    others, _ = priors(make(prior_caption="a cat", prior_count=3, model=changed))
    assert not cats & others


def test_nothing_is_drawn_into_a_folder_that_is_no_runs(make, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "holiday.png").write_bytes(b"x")
    with pytest.raises(TrainError, match="is not empty and contains no run"):
        set_up(make(prior_caption="a cat", prior_count=2))
    assert [path.name for path in out.iterdir()] == ["holiday.png"]


def test_the_pipeline_that_drew_pictures_of_the_class_is_the_one_that_is_trained(make, monkeypatch):
    loaded = []

    def counted(*arguments):
        loaded.append(load_pipeline(*arguments))
        return loaded[-1]

    monkeypatch.setattr(encoded, "load_pipeline", counted)
    job = set_up(make(prior_caption="a cat", prior_count=1))
    assert len(loaded) == 1
    assert job.base.processor.pipe is loaded[0]


def test_the_classs_loss_is_logged_without_its_weight(make, tmp_path):
    """The first step's: its base and its random numbers are those of the run with another weight."""
    first = []
    for weight in (1.0, 0.25):
        out = tmp_path / f"{weight}"
        config = make(prior_caption="a cat", prior_count=4, prior_weight=weight, batch_size=8, out=out)
        train(config, QUIET)
        first.append(next(row for row in RunFolder(config.out).rows() if "prior_loss" in row))
    assert first[0]["prior_loss"] == pytest.approx(first[1]["prior_loss"], rel=1e-3)
    assert first[0]["loss"] > first[1]["loss"]
