"""Tiny pipelines as fixtures."""

from __future__ import annotations

import pytest
import tiny_pipelines
from adapted_pipelines import with_adapters


@pytest.fixture
def sd1():
    return tiny_pipelines.tiny_sd1()


@pytest.fixture
def adapted():
    return with_adapters(tiny_pipelines.tiny_sd1())
