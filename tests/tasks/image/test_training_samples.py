"""Pictures that a run draws: the base's are kept only for the same prompts and settings, and damaged ones left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_pipelines

import lorakit as lk
from lorakit.bases.pipeline import as_module
from lorakit.generate.pictures import grid
from lorakit.tasks.image.samples import PicturePrompt, base_samples, draw, write_samples
from lorakit.tasks.text_to_image import TextToImageSettings
from lorakit.train.run_folder import RunFolder

PROMPTS = [PicturePrompt("a red cat", (16, 16)), PicturePrompt("a dog", (16, 16))]


@pytest.fixture(scope="module")
def base():
    pipe = tiny_pipelines.tiny_sd1()
    pipe.set_progress_bar_config(disable=True)
    lk.attach(pipe, lk.LoraConfig(rank=2))
    lk.activate(pipe, None)
    return SimpleNamespace(
        model=as_module(pipe), processor=SimpleNamespace(pipe=pipe), config=SimpleNamespace(model="sd1")
    )


@pytest.fixture
def columns(monkeypatch):
    """The columns of each grid that is written."""
    seen = []
    drawn = grid.grid

    def watched(rows, names, titles):
        assert {len(row) for row in rows} == {len(titles)}
        seen.append(list(titles))
        return drawn(rows, names, titles)

    monkeypatch.setattr(grid, "grid", watched)
    return seen


def own(**changes):
    return TextToImageSettings(**{"sample_steps": 1, "resolution": 16} | changes)


def test_the_bases_pictures_are_kept_for_the_same_prompts_and_settings_only(base, tmp_path):
    drawn = draw(own(), base, PROMPTS)
    write_samples(tmp_path, 2, drawn, drawn)
    kept = base_samples(tmp_path, own(), base, PROMPTS)
    assert [sample.picture.tobytes() for sample in kept] == [sample.picture.tobytes() for sample in drawn]
    for changes in ({"sample_seed": 1}, {"sample_steps": 2}, {"sample_guidance": 2.0}, {"sample_negative": "a dog"}):
        assert base_samples(tmp_path, own(**changes), base, PROMPTS) == [], changes
    assert base_samples(tmp_path, own(), base, [PROMPTS[0], PicturePrompt("a cat", (16, 16))]) == []
    assert base_samples(tmp_path, own(), base, [PicturePrompt(each.text, (24, 16)) for each in PROMPTS]) == []
    assert base_samples(tmp_path, own(), base, PROMPTS[:1]) == []


def test_other_prompts_or_seeds_have_columns_of_their_own(base, tmp_path, columns):
    first = draw(own(), base, PROMPTS)
    write_samples(tmp_path, 2, first, first)
    others = [PicturePrompt("a red dog", (16, 16))]
    second = draw(own(), base, others)
    write_samples(tmp_path, 4, second, second)
    assert [path.name for path in (tmp_path / "step-0").iterdir()] == ["1.png"]
    assert len(base_samples(tmp_path, own(), base, others)) == 1
    third = draw(own(sample_seed=3), base, others)
    for step in (6, 8):
        write_samples(tmp_path, step, third, third)
    assert columns == [["base", "step 2"], ["base", "step 4"], ["base", "step 6"], ["base", "step 6", "step 8"]]


def test_a_damaged_picture_or_a_strange_name_leaves_a_column_out_and_stops_no_run(base, tmp_path, columns):
    folder = RunFolder(tmp_path)
    drawn = draw(own(), base, PROMPTS)
    for step in (2, 4):
        write_samples(folder.samples, step, drawn, drawn)
    (folder.samples / "step-2" / "copy.png").write_bytes(b"x")
    (folder.samples / "step-2 copy").mkdir()
    (folder.samples / "step-4 copy.png").write_bytes(b"x")
    write_samples(folder.samples, 6, drawn, drawn)
    assert columns[-1] == ["base", "step 2", "step 4", "step 6"]
    assert [step for step, _ in folder.sampled()] == [2, 4, 6]
    damaged = folder.samples / "step-2" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    write_samples(folder.samples, 6, drawn, drawn)
    assert columns[-1] == ["base", "step 4", "step 6"]
    folder.rewind(2)
    assert [step for step, _ in folder.sampled()] == [2]
    assert (folder.samples / "step-4 copy.png").exists()
