"""Folders of pictures: captions beside them, in a metadata file, and nothing dropped without a word."""

from __future__ import annotations

import json

import pytest
from made_pictures import write_lines, write_pictures

from lorakit.data.pictures.find import find, is_pictures
from lorakit.data.pictures.folder import read_folder
from lorakit.errors import DataError


def captions(source):
    return {found.name: found.caption for found in source.pictures}


def refused(*words, **call):
    with pytest.raises(DataError) as caught:
        find(**call)
    for word in words:
        assert word in str(caught.value)


def test_captions_are_files_beside_the_pictures_in_nested_folders(tmp_path):
    write_pictures(tmp_path, {"b.png": "a b", "cats/a.PNG": None, "cats/deep/c.webp": None, "d.jpg": None})
    (tmp_path / "cats/a.caption").write_text("a cat,\n  on two lines\n")
    (tmp_path / "cats/deep/c.webp.txt").write_text("deep")  # the whole name with a suffix more
    (tmp_path / "d.TXT").write_text("d")
    source = find(tmp_path)
    assert captions(source) == {"b": "a b", "cats/a": "a cat, on two lines", "cats/deep/c": "deep", "d": "d"}
    assert [found.folder for found in source.pictures] == ["", "cats", "cats/deep", ""]
    assert source.notes == {}


def test_a_blank_caption_file_is_no_caption(tmp_path):
    write_pictures(tmp_path, {"a.png": "  "})
    assert captions(find(tmp_path)) == {"a": None}


def test_files_that_are_not_used_are_noted_once(tmp_path):
    write_pictures(tmp_path, {"a.png": "a", "more/b.png": "b"})
    (tmp_path / "lost.txt").write_text("x")
    (tmp_path / "more/README.md").write_text("x")
    (tmp_path / "sheet.psd").write_bytes(b"x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    notes = find(tmp_path).notes
    assert notes == {
        "caption files without a picture, not used: lost.txt": 1,
        "files that are neither picture nor caption: more/README.md, sheet.psd": 2,
    }


def test_two_captions_that_differ_are_refused_and_equal_ones_are_one(tmp_path):
    write_pictures(tmp_path, {"a.png": "one"})
    (tmp_path / "a.caption").write_text("one")
    assert captions(find(tmp_path)) == {"a": "one"}
    (tmp_path / "a.caption").write_text("two")
    refused("a.png has two captions that differ", "a.caption", "a.txt", source=tmp_path)


def test_a_caption_in_another_encoding_is_named(tmp_path):
    write_pictures(tmp_path, {"a.png": None})
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused("a.txt, line 1: byte 0xe9", "UTF-8", source=tmp_path)


def test_a_folder_without_pictures_says_what_is_in_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    refused("no pictures", "rows.jsonl", ".png", source=tmp_path)


def test_one_picture_is_not_a_folder(tmp_path):
    write_pictures(tmp_path, {"a.png": "a"})
    refused("is one picture", source=tmp_path / "a.png")


def test_folders_of_masks_and_of_the_prior_are_left_out(tmp_path):
    write_pictures(tmp_path, {"a.png": "a", "masks/a.png": None, "class/x.png": None})
    source = find(tmp_path, leave_out=[tmp_path / "masks", tmp_path / "class"])
    assert captions(source) == {"a": "a"}


def test_splits_are_folders(tmp_path):
    write_pictures(tmp_path, {"train/a.png": "a", "test/b.png": "b"})
    refused("several splits", "--split train", source=tmp_path)
    refused("no folder for split 'dev'", "test, train", source=tmp_path, split="dev")
    assert captions(find(tmp_path, split="test")) == {"b": "b"}


# ------------------------------------------------------------------------------------- metadata files


def test_metadata_jsonl_names_pictures_relative_to_itself(tmp_path):
    write_pictures(tmp_path, {"a.png": None, "cats/b.png": None})
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "an a", "score": 3})
    write_lines(tmp_path / "cats/metadata.jsonl", {"file_name": "b.png", "caption": " a \n b "})
    source = find(tmp_path)
    assert captions(source) == {"a": "an a", "cats/b": "a b"}
    assert source.notes == {"metadata.jsonl: columns that are not used: score": 1}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_metadata_may_be_csv_or_parquet(tmp_path, suffix):
    write_pictures(tmp_path, {"a.png": None, "b.png": None})
    rows = [{"file_name": "a.png", "text": "an a"}, {"file_name": "b.png", "text": "a, b"}]
    if suffix == "csv":
        (tmp_path / "metadata.csv").write_text('file_name,text\na.png,an a\nb.png,"a, b"\n')
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    assert captions(find(tmp_path)) == {"a": "an a", "b": "a, b"}


def test_other_columns_are_named(tmp_path):
    write_pictures(tmp_path, {"a.png": None})
    write_lines(tmp_path / "metadata.jsonl", {"path": "a.png", "blip": "an a"})
    assert captions(find(tmp_path, columns={"image": "path", "caption": "blip"})) == {"a": "an a"}
    refused("no column file_name", "--columns image=NAME", source=tmp_path)
    refused("no column 'blup'", "did you mean 'blip'", source=tmp_path, columns={"image": "path", "caption": "blup"})
    refused("'text' is not a column of pictures", source=tmp_path, columns={"text": "blip"})


def test_a_row_that_names_no_picture_is_an_error(tmp_path):
    write_pictures(tmp_path, {"cats/lion.png": None})
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "cats/loin.png", "text": "a"})
    refused("row 1: there is no picture 'cats/loin.png'", "did you mean 'cats/lion.png'", source=tmp_path)


@pytest.mark.parametrize("value", [3, ["a", "b"]])
def test_a_caption_that_is_no_text_is_an_error(tmp_path, value):
    write_pictures(tmp_path, {"a.png": None})
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": value})
    refused("row 1: its text is a", "expected the caption as text", source=tmp_path)


def test_a_file_beside_a_picture_that_the_metadata_names_is_noted(tmp_path):
    write_pictures(tmp_path, {"a.png": "beside"})
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "listed"})
    source = find(tmp_path)
    assert captions(source) == {"a": "listed"}
    assert source.notes == {"with a caption in the metadata file and one beside, which is not used: a.png": 1}


def test_a_metadata_file_itself_is_a_source_of_the_pictures_it_names(tmp_path):
    write_pictures(tmp_path, {"a.png": None, "b.png": None})
    rows = write_lines(tmp_path / "some.jsonl", {"file_name": "b.png", "text": "a b"})
    assert captions(find(rows)) == {"b": "a b"}


def test_kohyas_metadata_joins_caption_and_tags(tmp_path):
    write_pictures(tmp_path, {"a.png": None, "10_cat/b.png": None})
    meta = {"/home/me/a.png": {"caption": "an a", "tags": "x, y"}, "b": {"tags": "z", "train_resolution": [64, 64]}}
    (tmp_path / "meta_lat.json").write_text(json.dumps(meta))
    source = find(tmp_path)
    assert captions(source) == {"10_cat/b": "z", "a": "an a, x, y"}
    assert source.notes == {}
    (tmp_path / "meta_lat.json").write_text(json.dumps({"c": {"caption": "a c"}}))
    refused("no picture 'c'", source=tmp_path)


def test_other_json_is_only_a_file_that_is_not_used(tmp_path):
    write_pictures(tmp_path, {"a.png": "a"})
    (tmp_path / "settings.json").write_text('{"a": 1}')
    assert list(find(tmp_path).notes) == ["files that are neither picture nor caption: settings.json"]


# ------------------------------------------------------------------------------------- which sources are pictures


def test_folders_and_files_of_pictures_are_told_from_text(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, **k: pytest.fail("the hub was asked for a file"))
    write_pictures(tmp_path / "pictures", {"deep/a.png": "a"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text/rows.jsonl").write_text('{"prompt": "a.png", "completion": "b"}\n')
    listed = write_lines(tmp_path / "pictures/rows.jsonl", {"file_name": "deep/a.png", "text": "a"})
    assert is_pictures(tmp_path / "pictures")
    assert is_pictures(listed)
    assert not is_pictures(tmp_path / "text")
    assert not is_pictures(tmp_path / "text/rows.jsonl")
    write_pictures(tmp_path / "text", {"plots/loss.png": None})  # an illustration beside rows of text
    assert not is_pictures(tmp_path / "text")
    for missing in ("nowhere.jsonl", "nowhere.parquet", "no/such/folder"):
        assert not is_pictures(missing)


def test_pictures_of_every_suffix_are_found(tmp_path):
    suffixes = ("png", "jpg", "jpeg", "jfif", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "jxl")
    for suffix in suffixes:
        (tmp_path / f"{suffix}.{suffix}").write_bytes(b"")
    assert len(read_folder(tmp_path).pictures) == len(suffixes)


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    write_pictures(tmp_path, {"deep/a.png": "a"})
    (tmp_path / "deep/back").symlink_to(tmp_path)
    assert len(read_folder(tmp_path).pictures) == 1
