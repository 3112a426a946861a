"""A tiny model and its rows on disk, made once, and a run's configuration."""

from __future__ import annotations

import pytest
import tiny_lm


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    return tiny_lm.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_lm.rows())


@pytest.fixture
def make_config(model_folder, data_file, tmp_path):
    """`make_config(**changes)`: a short run into `tmp_path / "run"`."""

    def make(**changes):
        given = {"model": model_folder, "data": data_file, "out": tmp_path / "run"} | changes
        return tiny_lm.config(given.pop("model"), given.pop("data"), given.pop("out"), **given)

    return make
