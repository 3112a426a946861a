"""Fixtures for the tests of layers."""

from __future__ import annotations

import pytest

from lorakit.layers import blocks


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each op was called by a block."""
    counted = dict.fromkeys(("gated_mlp", "rope_attention", "project", "rms_norm"), 0)

    def counting(name: str):
        run = getattr(blocks, name)

        def count(*args):
            counted[name] += 1
            return run(*args)

        return count

    for name in counted:
        monkeypatch.setattr(blocks, name, counting(name))
    return counted
