"""Adapters on disk, as the server finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from served_adapters import write


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with the adapters a and b."""
    write(tmp_path / "root" / "a", 1, data={"template": "chat", "end_tokens": ["<a>"]})
    write(tmp_path / "root" / "b", 2, data={"template": "plain"})
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of an adapter, sql."""
    return write(tmp_path / "sql", data={"template": "chat", "end_tokens": ["<end>"]})
