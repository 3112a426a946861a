"""Fixtures for the tests of fused modules."""

from __future__ import annotations

import pytest

from lorakit.layers import linear
from lorakit.layers.fused import attention, fused, gated_mlp, rms_norm


@pytest.fixture(autouse=True)
def nothing_probed(monkeypatch):
    """Each test probes for itself: what the process remembers of another one's modules is hidden."""
    monkeypatch.setattr(fused, "_probed", {})


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each op was called by a module: by a probe too, so take differences (see `fused_models.counts`)."""
    places = {"gated_mlp": gated_mlp, "rms_norm": rms_norm, "causal_attention": attention, "project": linear}
    counted = dict.fromkeys(places, 0)

    def counting(name: str):
        run = getattr(places[name], name)

        def count(*args, **kwargs):
            counted[name] += 1
            return run(*args, **kwargs)

        return count

    for name, place in places.items():
        monkeypatch.setattr(place, name, counting(name))
    return counted
