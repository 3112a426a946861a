"""A tiny model and an adapter of it."""

from __future__ import annotations

import pytest
import tiny
from tier_sources import made

import lorakit as lk


@pytest.fixture(scope="module")
def first() -> lk.Adapter:
    return made(tiny.llama)


@pytest.fixture
def model():
    return tiny.llama()
