"""What is printed of a set of pictures."""

from __future__ import annotations

import io
import json

import pytest
from made_pictures import scene, write_pictures
from rich.console import Console

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
