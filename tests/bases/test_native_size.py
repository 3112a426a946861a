"""The size of pictures from config files, against what the loaded pipeline says of itself."""

from __future__ import annotations

import json

import pytest
import tiny_families
import tiny_pipelines

from lorakit.bases.native_size import FALLBACK, native_size
from lorakit.tasks.image.encoded import resolution_of
from lorakit.tasks.image.latents import size_multiple


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_configs_of_each_family_say_what_the_loaded_pipeline_does(family, tmp_path):
    pipe = tiny_families.FAMILIES[family]().pipe
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("unet", "transformer", "vae"):
        part = getattr(pipe, name, None)
        if part is not None:
            part.save_config(tmp_path / name)
    assert native_size(str(tmp_path)) == (resolution_of(pipe), size_multiple(pipe))


def test_a_saved_pipelines_size_is_what_it_draws(tmp_path):
    pipe = tiny_pipelines.tiny_sd1()
    pipe.save_pretrained(tmp_path)
    picture = pipe("a cat", num_inference_steps=1, output_type="np").images[0]
    assert picture.shape[:2] == (native_size(str(tmp_path))[0],) * 2


def test_a_model_that_is_no_pipeline_or_not_here_has_no_size(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert native_size(str(tmp_path)) is None
    assert native_size("someone/never-fetched") is None
    assert native_size(str(tmp_path / "nowhere")) is None


def test_configs_that_say_nothing_give_a_usual_size(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps({"patch_size": [1, 2, 2]}))
    assert native_size(str(tmp_path)) == (FALLBACK, 16)


def test_each_revision_has_its_own(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--pipe"
    for revision, size in (("main", 8), ("large", 16)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(revision)
        folder = repository / "snapshots" / revision
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "unet/config.json").write_text(json.dumps({"sample_size": size}))
    assert native_size("someone/pipe") == native_size("someone/pipe", "main") == (64, 8)
    assert native_size("someone/pipe", "large") == (128, 8)
    assert native_size("someone/pipe", "none") is None
