"""A stub of the hub, and an adapter's folder."""

from __future__ import annotations

import hub_stub
import pytest
from sample_adapter import adapter


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stub.serve(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def folder(tmp_path):
    return adapter().save(tmp_path / "adapter")
