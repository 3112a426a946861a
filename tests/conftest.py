"""Fixtures for all tests: tiny models (see `tiny.py`), one thread."""

from __future__ import annotations

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture
def tiny_llama():
    return tiny.llama()


@pytest.fixture
def tied_llama():
    return tiny.llama(tied=True)


@pytest.fixture
def tiny_gpt2():
    return tiny.gpt2()


@pytest.fixture
def tiny_bert():
    return tiny.bert()


@pytest.fixture
def tiny_t5():
    return tiny.t5()


@pytest.fixture
def tiny_mlp():
    return tiny.mlp()


@pytest.fixture
def tiny_cnn():
    return tiny.cnn()
