"""The walk over a base's modules: never lorakit's own children, always all of the base's."""

from __future__ import annotations

import tiny
from torch import nn

import lorakit as lk
from lorakit.layers.walk import base_modules


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in base_modules(model)]


def test_adapters_come_and_go_and_the_walk_stays_the_same():
    model = tiny.mlp()
    before = names(model)
    for name in "abc":
        lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"], bias="all" if name == "b" else "none"), name=name)
        assert names(model) == before
    for name in "bac":
        lk.detach(model, name)
        assert names(model) == before


def test_a_child_that_an_adapted_module_gets_later_is_found():
    model = tiny.mlp()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"]), name="a")
    nn.utils.parametrizations.weight_norm(model.lin1)
    model.lin0.add_module("later", nn.ReLU())
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"]), name="b")
    assert "lin0.later" in names(model)
    assert "lin1.parametrizations" in names(model)
    assert not [name for name in names(model) if "lora_" in name]
