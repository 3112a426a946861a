"""The image demo in a few steps and on a few pictures: what it trains, writes, measures and draws."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import lorakit as lk
from lorakit.bases.load_pipeline import embedded_pipeline, load_pipeline
from lorakit.cli import run as cli
from lorakit.reproduce.demo_image import ALONE, DIFFUSERS_FILE, PICTURES, run
from lorakit.reproduce.emoji.captions import emoji_list
from lorakit.reproduce.image_data import SUBJECT, style_objects, subject_prompt, write_style, write_subject
from lorakit.reproduce.image_figure import COLUMNS, ROWS

STEPS = 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, outcome, printed lines) after two steps of each training."""
    out = tmp_path_factory.mktemp("demo-image") / "demo"
    lines: list[str] = []
    outcome = run(out, steps=STEPS, compare=True, few=True, say=lines.append)
    return out, outcome, lines


def test_four_adapters_are_trained_and_written_in_two_formats(demo):
    _, outcome, lines = demo
    assert [adapter.name for adapter in outcome.adapters] == ["style", "subject", ALONE, "slider"]
    assert [line[0] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    pipe = load_pipeline("embedded", torch.float32, torch.device("cpu"))
    for adapter in outcome.adapters:
        one, other = (lk.Adapter.load(adapter.files[name]) for name in ("diffusers", "kohya"))
        assert one.updates.keys() == other.updates.keys()
        lk.attach(pipe, one, name=adapter.name)
        assert adapter.seconds > 0
    assert lk.summary(pipe)


def test_the_figures_have_their_shapes_and_are_json(demo):
    _, outcome, _ = demo
    figures = json.loads(json.dumps(outcome.to_dict()))["figures"]
    assert list(figures) == ["style", "subject", "slider", "stacked"]
    assert list(figures["style"]["distance"]) == list(figures["style"]["objects"]) == ["0", "0.5", "1"]
    assert figures["style"]["distance_left"] == pytest.approx(
        figures["style"]["distance"]["1"] / figures["style"]["distance"]["0"]
    )
    assert list(figures["subject"]["recognized"]) == ["base", "subject"]
    assert list(figures["subject"]["kinds_of_animals"]) == ["base", "with prior", "without prior"]
    assert list(figures["slider"]["area"]) == ["-2", "-1", "0", "1", "2"]
    for shares in (figures["style"]["objects"], figures["slider"]["area"], figures["subject"]["recognized"]):
        assert all(0 <= share <= 1 for share in shares.values())


def test_the_merged_pipeline_draws_what_base_and_adapters_draw(demo):
    out, outcome, _ = demo
    assert outcome.merged == str(out / "merged")
    assert outcome.merged_difference <= 1
    assert sorted(p.name for p in (out / "merged").iterdir() if p.is_dir()) == sorted(
        p.name for p in embedded_pipeline().iterdir() if p.is_dir()
    )


def test_the_picture_has_a_cell_for_every_row_and_prompt(demo):
    _, outcome, _ = demo
    with Image.open(outcome.picture) as picture:
        assert picture.width > len(COLUMNS) * 160
        assert picture.height > len(ROWS) * 160


def test_a_second_run_resumes_and_gives_the_same_adapters(demo):
    out, outcome, _ = demo
    files = [out / name / "adapter" / DIFFUSERS_FILE for name in ("style", "slider")]
    before = [path.read_bytes() for path in files]
    again = run(out, steps=STEPS, compare=True, few=True, say=lambda _: None)
    assert [path.read_bytes() for path in files] == before
    assert again.figures == outcome.figures


def test_the_pictures_of_style_and_subject_are_of_what_they_say(tmp_path):
    seen, kept = style_objects()
    known = [emoji.word for emoji in emoji_list() if emoji.seen]
    assert sorted(seen + kept) == sorted(known)
    assert SUBJECT not in known
    assert {thing for thing, _ in COLUMNS} <= set(kept)
    write_style(tmp_path / "style", lambda pictures: -pictures, seed=1)
    write_subject(tmp_path / "subject", seed=1)
    captions = [path.read_text().strip() for path in sorted((tmp_path / "style").glob("*.txt"))]
    assert len(captions) == 24
    assert all(f" {thing} " in caption for thing, caption in zip(seen, captions, strict=True))
    assert len(list((tmp_path / "subject").glob("*.png"))) == 6
    assert (tmp_path / "subject" / "01.txt").read_text() == subject_prompt("meadow") + "\n"
    before = (tmp_path / "style" / "01.png").read_bytes()
    write_style(tmp_path / "style", lambda pictures: -pictures, seed=1)
    assert (tmp_path / "style" / "01.png").read_bytes() == before


def test_foreign_folders_are_never_replaced_and_rows_are_of_the_text_demo(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    for force in ([], ["--force"]):
        assert cli(["demo", "--image", "--out", str(tmp_path), *force]) == 2
        assert "not empty and not a demo's folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert cli(["demo", "--image", "--rows", "3"]) == 2
    assert "--rows is for the text demo" in capsys.readouterr().err
    assert PICTURES.startswith("lorakit")
