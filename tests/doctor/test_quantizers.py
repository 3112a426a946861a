"""doctor's report of quantizers: each is tried, and what is missing or broken is said with its fix."""

from __future__ import annotations

import pytest
import quantized
import torch

from lorakit.config import QUANTIZERS
from lorakit.doctor import quantizers


def test_every_quantizer_is_tried_and_every_kind_of_checkpoint_listed():
    quantized.library()
    found = {each.name: each for each in quantizers.quantizers()}
    assert [name for name in found if found[name].loads] == list(QUANTIZERS)
    assert all(found[name].usable for name in ("nf4", "fp4", "int8", "GPTQ, AWQ checkpoints"))
    assert found["nf4"].why.startswith("bitsandbytes, on ")


def test_what_is_not_installed_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(quantizers, "is_installed", lambda package: False)
    found = {each.name: each for each in quantizers.quantizers()}
    assert not any(found[name].usable for name in QUANTIZERS)
    assert found["nf4"].why == "bitsandbytes is not installed: pip install 'lorakit[quant]'"
    assert found["hqq checkpoints"].why == "hqq is not installed: pip install hqq"
    assert found["GPTQ, AWQ checkpoints"].usable


@pytest.mark.parametrize(
    "broken, why",
    [
        (lambda *a: (_ for _ in ()).throw(RuntimeError("no kernel")), "fails on cpu: RuntimeError: no kernel"),
        (lambda *a: torch.nn.Linear(64, 64), "computes something else on cpu: off by"),
    ],
)
def test_a_library_that_fails_is_reported_not_raised(monkeypatch, broken, why):
    monkeypatch.setattr(quantizers, "_linear", broken)
    monkeypatch.setattr(quantizers, "is_installed", lambda package: True)
    found = quantizers.quantizers()[0]
    assert not found.usable
    assert why in found.why
