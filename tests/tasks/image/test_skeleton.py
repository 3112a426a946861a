"""A pipeline without weights, for `lorakit plan`."""

from __future__ import annotations

import sys

import pytest

from lorakit.errors import LorakitError
from lorakit.tasks.image.skeleton import index


def test_without_diffusers_the_error_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[image\]'"):
        index(str(tmp_path), None)
