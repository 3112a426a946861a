"""The contact sheet: each picture with its crop, and captions in any script."""

from __future__ import annotations

import numpy as np
import pytest
from made_pictures import write_pictures
from PIL import Image, ImageDraw

from lorakit.analysis import contact_sheet as sheet
from lorakit.analysis.labels import wrapped
from lorakit.data.pictures.read import read_pictures
from lorakit.data.pictures.settings import PictureSettings

BUCKETS = {"bucket_max": 96, "bucket_step": 16}


def read(folder, **given):
    return read_pictures(folder, PictureSettings(**given), resolution=64, multiple=8)


def pages(data, title="title"):
    return list(sheet.sheets(data.pictures, title, 0.15))


def test_the_sheet_shows_each_picture_bright_inside_its_crop_and_dark_outside(tmp_path):
    Image.new("RGB", (256, 64), (200, 200, 200)).save(tmp_path / "wide.png")
    (page,) = pages(read(tmp_path, caption="a", **BUCKETS))
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


@pytest.mark.parametrize("caption", ["Кошка на лугу", "γάτα", "एक बिल्ली"])
def test_captions_are_drawn_as_other_labels_are(caption, tmp_path):
    write_pictures(tmp_path, {"a.png": caption}, size=(64, 64))
    (page,) = pages(read(tmp_path))
    label = wrapped(caption, sheet.CELL, sheet.TEXT)
    expected = Image.new("RGB", (sheet.CELL, label.height + 4), sheet.PAPER)
    label.draw(ImageDraw.Draw(expected), 0, 0, sheet.INK)
    x, y = sheet.GAP, sheet.GAP + sheet.LINE + 8 + sheet.CELL + 4 + 2 * sheet.LINE + 3
    found = page.crop((x, y, x + expected.width, y + expected.height))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
