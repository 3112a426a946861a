"""What is printed and drawn of a set of pictures."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from made_pictures import scene, write_pictures
from PIL import Image
from rich.console import Console

from lorakit.data.pictures import sheet
from lorakit.data.pictures.read import read_pictures
from lorakit.data.pictures.settings import PictureSettings
from lorakit.data.pictures.show import bucket_lines, report, show


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pictures", {"a.png": "a square", "2_b/b.png": "[a] twice"}, size=(64, 64))
    scene(256, 64, seed=5).save(tmp_path / "pictures/wide.png")
    (tmp_path / "pictures/wide.txt").write_text("a wide one")
    return tmp_path / "pictures"


def read(folder, **given):
    return read_pictures(folder, PictureSettings(bucket_max=96, bucket_step=16, **given), resolution=64, multiple=8)


def printed(data, rows=3, **how):
    out = io.StringIO()
    show(data, rows, Console(file=out, width=how.pop("width", 200), **how))
    return out.getvalue()


def test_counts_buckets_captions_and_notes_are_printed(folder):
    text = printed(read(folder), rows=2)
    lines = text.splitlines()
    assert any(line.split() == [f"{folder}/2_b", "1", "1", "2"] for line in lines)
    assert any(line.split() == ["64x64", "2", "0.0%", "0.0%"] for line in lines)
    assert "b.png  [a] twice" in text
    assert "a wide one" not in text.split("notes")[0]
    assert "wide.png (25%)" in text


def test_a_narrow_terminal_cuts_nothing(folder):
    text = printed(read(folder), width=40, force_terminal=True, color_system=None)
    assert "their folder's name says: 2_b" in " ".join(text.split())


def test_pictures_of_the_prior_are_marked(folder, tmp_path):
    write_pictures(tmp_path / "class", {"x.png": "a thing"})
    text = printed(read(folder, prior_data=str(tmp_path / "class")))
    assert any(line.split() == [f"{tmp_path}/class", "1", "1", "1", "prior"] for line in text.splitlines())


def test_the_bucket_table_counts_every_picture_once(folder):
    data = read(folder)
    rows = [line.split() for line in bucket_lines(data)[1:]]
    assert sum(int(row[1]) for row in rows) == 3
    assert rows[0] == ["96x32", "1", "25.0%", "25.0%"]


def test_the_report_is_json(folder):
    facts = json.loads(json.dumps(report(read(folder))))
    assert (facts["pictures"], facts["items"], facts["resolution"]) == (3, 4, 64)
    assert {entry["caption"] for entry in facts["captions"]} == {"a square", "[a] twice", "a wide one"}
    assert facts["buckets"][0]["cropped_most"] == pytest.approx(0.25)


# ------------------------------------------------------------------------------------- the contact sheet


def pages(data, title="title"):
    return list(sheet.sheets(data.pictures, title, 0.15))


def test_the_sheet_shows_each_picture_bright_inside_its_crop_and_dark_outside(tmp_path):
    Image.new("RGB", (256, 64), (200, 200, 200)).save(tmp_path / "wide.png")
    (page,) = pages(read(tmp_path, caption="a"))
    found = np.asarray(page).astype(int)
    bottom = sheet.GAP + sheet.LINE + 8 + sheet.CELL
    row = found[bottom - 20]  # through the picture, which stands at the bottom of its cell
    dark = (np.abs(row - 200 * sheet.SHADOW).max(-1) < 3).sum()
    bright = (np.abs(row - 200).max(-1) < 3).sum()
    frame = (np.abs(row - sheet.FRAME).max(-1) == 0).sum()
    assert dark / (dark + bright + frame) == pytest.approx(0.25, abs=0.02)
    assert frame == 4


def test_a_mask_is_tinted(tmp_path):
    image = Image.new("RGBA", (64, 64), (200, 200, 200, 255))
    image.paste((200, 200, 200, 0), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    (page,) = pages(read(tmp_path, caption="a", mask="alpha"))
    top = sheet.GAP + sheet.LINE + 8
    left_side, right_side = page.getpixel((sheet.GAP + 20, top + 100)), page.getpixel((sheet.GAP + 200, top + 100))
    assert right_side == (200, 200, 200)
    assert left_side[0] > left_side[1] + 50


def test_many_pictures_take_several_pages_and_random_crops_and_long_captions_fit(tmp_path):
    write_pictures(tmp_path, {f"{number:02}.png": "word " * 60 for number in range(21)}, size=(100, 40))
    data = read(tmp_path, crop="random", buckets=False, caption="x")
    first, second = pages(data)
    assert first.width > second.width
    out = tmp_path / "sheet.png"
    assert sheet.page_paths(out, 21) == [tmp_path / "sheet-1.png", tmp_path / "sheet-2.png"]
    assert sheet.page_paths(out, 20) == [out]
