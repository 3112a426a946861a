"""`lorakit data show` on pictures: counts, buckets, captions, the contact sheet, and errors that name files."""

from __future__ import annotations

import json

import pytest
from made_pictures import scene, write_lines, write_pictures
from PIL import Image

from lorakit.config import part
from lorakit.tasks.image.encoded import Pictures
from lorakit.tasks.text_to_image import TextToImageSettings
from lorakit.train.config import TrainConfig


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "my pictures", {"a.png": "a cat", "b.png": "a dog", "c/c.png": "a fox"}, (64, 48))


def test_pictures_are_told_by_what_is_in_the_folder(lorakit, folder):
    code, out, error = lorakit("data", "show", folder, "--resolution", "64", "--trigger", "sks", "--rows", "2")
    assert (code, error) == (0, "")
    assert "sks, a cat" in out
    assert "a fox" not in out
    assert "buckets, resolution 64" in out
    last = out.splitlines()[-1]
    assert last == f"next: lorakit image train '{folder}' --resolution 64 --trigger sks"


def test_repeats_are_given_by_folder(lorakit, folder):
    code, out, _ = lorakit("data", "show", folder, "--resolution", "64", "--repeats", "c=3,my pictures=2")
    assert code == 0
    assert any(line.split()[-3:] == ["1", "1", "3"] for line in out.splitlines())
    assert out.splitlines()[-1].endswith("--repeats 'c=3,my pictures=2'")


def test_the_contact_sheet_is_a_png(lorakit, folder, tmp_path):
    sheet = tmp_path / "out" / "sheet.png"
    code, out, _ = lorakit("data", "show", folder, "--resolution", "64", "--out", sheet)
    assert code == 0
    assert f"written: {sheet}" in out
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    before = sheet.read_bytes()
    (folder / "a.png").write_bytes(b"")
    assert lorakit("data", "show", folder, "--out", sheet)[0] == 1
    assert sheet.read_bytes() == before
    assert lorakit("data", "show", folder, "--out", tmp_path / "sheet.jpg")[0] == 2


def test_the_contact_sheet_never_replaces_or_joins_the_pictures(lorakit, folder):
    before = (folder / "a.png").read_bytes()
    for name in ("a.png", "c/sheet.png"):
        code, _, error = lorakit("data", "show", folder, "--resolution", "64", "--out", folder / name)
        assert code == 2
        assert "would be one of the pictures\n  write it somewhere else" in error
    assert (folder / "a.png").read_bytes() == before
    assert not (folder / "c/sheet.png").exists()


def test_buckets_are_those_of_training(lorakit, folder, tmp_path):
    config = TrainConfig(task="text_to_image", model="embedded", data=str(folder), out=str(tmp_path / "run"))
    resolution, multiple = Pictures(config, part(config, TextToImageSettings)).sizes()
    assert (resolution, multiple) == (32, 8)
    facts = json.loads(lorakit("data", "show", folder, "--model", "embedded", "--json")[1])
    assert facts["resolution"] == resolution
    assert all(bucket[side] % multiple == 0 for bucket in facts["buckets"] for side in ("width", "height"))
    assert lorakit("data", "show", folder, "--resolution", "60")[0] == 2


def test_json_has_the_counts(lorakit, folder, tmp_path):
    code, out, _ = lorakit("data", "show", folder, "--resolution", "64", "--json", "--out", tmp_path / "s.png")
    facts = json.loads(out)
    assert code == 0
    assert (facts["pictures"], facts["sheets"]) == (3, [str(tmp_path / "s.png")])


def test_a_metadata_file_of_pictures(lorakit, folder):
    rows = write_lines(folder / "rows.jsonl", {"file_name": "a.png", "blip": "a cat again"})
    code, out, _ = lorakit("data", "show", rows, "--resolution", "64", "--columns", "caption=blip")
    assert code == 0
    assert "a cat again" in out


def test_the_models_own_resolution_is_used_and_said(lorakit, folder, tmp_path):
    (tmp_path / "pipe/unet").mkdir(parents=True)
    (tmp_path / "pipe/model_index.json").write_text("{}")
    (tmp_path / "pipe/unet/config.json").write_text('{"sample_size": 8}')
    code, out, _ = lorakit("data", "show", folder, "--model", tmp_path / "pipe")
    assert code == 0
    assert "resolution 64: the" in out
    assert "next: lorakit image train" in out
    assert f"--model {tmp_path / 'pipe'}" in out
    out = lorakit("data", "show", folder, "--model", "nobody/has-this")[1]
    assert "resolution 512: nobody/has-this is not on this disk" in out


@pytest.mark.parametrize(
    "change, code, message",
    [
        (lambda folder: (folder / "a.txt").unlink(), 1, "1 of 3 pictures have no caption"),
        (lambda folder: (folder / "b.png").write_bytes(b"\x89PNG"), 1, "1 of 3 pictures cannot be used"),
        (lambda folder: (folder / "b.txt").write_bytes(b"\xff\xfe\x00"), 1, "b.txt"),
    ],
)
def test_pictures_that_cannot_be_trained_on_are_named(lorakit, folder, change, code, message):
    change(folder)
    found, _, error = lorakit("data", "show", folder)
    assert found == code
    assert message in error


def test_options_for_the_other_kind_of_data_are_refused(lorakit, folder, data):
    code, _, error = lorakit("data", "show", folder, "--train-on", "all", "--max-length", "8")
    assert code == 2
    assert "is pictures, and --train-on, --max-length is for text" in error
    code, _, error = lorakit("data", "show", data, "--resolution", "64")
    assert code == 2
    assert "is text, and --resolution is for pictures" in error


def test_a_setting_that_is_wrong_is_named(lorakit, folder):
    code, _, error = lorakit("data", "show", folder, "--crop", "centre")
    assert code == 2
    assert "crop" in error
    assert "'center'" in error


def test_a_picture_that_loses_much_is_named(lorakit, folder):
    scene(256, 64).save(folder / "wide.png")
    (folder / "wide.txt").write_text("wide")
    out = lorakit("data", "show", folder, "--resolution", "64", "--no-buckets")[1]
    assert "more than 15% is cropped away: wide.png (75%)" in out
