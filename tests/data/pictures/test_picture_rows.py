"""Data sets with a column of pictures: Parquet, Arrow and the hub, through `datasets`."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
from made_pictures import scene

from lorakit.data.pictures.find import find, is_pictures
from lorakit.data.pictures.read import read_pictures
from lorakit.data.pictures.settings import PictureSettings
from lorakit.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(**renamed):
    pictures = [scene(seed=seed) for seed in range(3)]
    columns = {"image": pictures, "text": ["one", "two", "three"], "id": [1, 2, 3]}
    return datasets.Dataset.from_dict({renamed.get(name, name): values for name, values in columns.items()})


def check(source, notes=True):
    data = read_pictures(source, PictureSettings(), resolution=48)
    assert [item.caption for item in data.items] == ["one", "two", "three"]
    for seed, item in enumerate(data.items):
        np.testing.assert_array_equal(np.asarray(item.decoded().rgb), np.asarray(scene(seed=seed)))
    assert data.items[1].where.endswith("row 2")
    assert data.notes.get("columns that are not used: id") == 3
    return data


def test_a_parquet_file_with_pictures_inside(tmp_path):
    rows().to_parquet(tmp_path / "data.parquet")
    assert is_pictures(tmp_path / "data.parquet")
    check(tmp_path / "data.parquet")


def test_a_parquet_file_that_does_not_say_which_column_is_a_picture(tmp_path):
    import pyarrow
    from pyarrow import parquet

    out = []
    for seed in range(3):
        file = io.BytesIO()
        scene(seed=seed).save(file, "PNG")
        out.append({"image": {"bytes": file.getvalue(), "path": None}, "text": "x"})
    parquet.write_table(pyarrow.Table.from_pylist(out), tmp_path / "plain.parquet")
    assert is_pictures(tmp_path / "plain.parquet")
    assert len(find(tmp_path / "plain.parquet").pictures) == 3


def test_a_folder_of_parquet_files_as_the_hub_has_them(tmp_path):
    (tmp_path / "repo/data").mkdir(parents=True)
    rows().to_parquet(tmp_path / "repo/data/train-00000-of-00001.parquet")
    rows().to_parquet(tmp_path / "repo/data/test-00000-of-00001.parquet")
    assert is_pictures(tmp_path / "repo")
    check(tmp_path / "repo")
    assert len(find(tmp_path / "repo", split="test").pictures) == 3


def test_a_saved_arrow_folder(tmp_path):
    rows().save_to_disk(tmp_path / "arrow")
    assert is_pictures(tmp_path / "arrow")
    check(tmp_path / "arrow")


def test_a_data_set_on_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **how: datasets.DatasetDict({"train": rows()}))
    check("someone/pictures")
    with pytest.raises(DataError, match="no split 'test'"):
        find("someone/pictures", split="test")


def test_columns_of_other_names_are_given(tmp_path):
    rows(image="photo", text="blip").to_parquet(tmp_path / "a.parquet")
    found = find(tmp_path / "a.parquet", columns={"caption": "blip"})
    assert [one.caption for one in found.pictures] == ["one", "two", "three"]
    with pytest.raises(DataError, match=r"no column 'foto'.*did you mean 'photo'"):
        find(tmp_path / "a.parquet", columns={"image": "foto"})


def test_without_a_column_of_captions_the_error_names_the_option(tmp_path):
    rows(text="blip").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"3 of 3 pictures have no caption.*\n.*--columns caption=NAME"):
        read_pictures(tmp_path / "a.parquet", PictureSettings())


def test_several_columns_of_pictures_need_a_choice(tmp_path):
    data = rows().remove_columns(["image"])
    both = {"before": [scene()] * 3, "after": [scene(seed=1)] * 3, "text": data["text"]}
    datasets.Dataset.from_dict(both).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="several columns of pictures, before, after"):
        find(tmp_path / "a.parquet")
    assert len(find(tmp_path / "a.parquet", columns={"image": "after"}).pictures) == 3


def test_a_row_without_a_picture_is_named(tmp_path):
    file = io.BytesIO()
    scene().save(file, "PNG")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    values = {"image": [{"bytes": file.getvalue(), "path": None}, None], "text": ["a", "b"]}
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: its image is null"):
        read_pictures(tmp_path / "a.parquet", PictureSettings(), resolution=48)


def test_text_in_parquet_is_not_pictures(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    assert not is_pictures(tmp_path / "a.parquet")
