"""The rows of `lorakit bench attach`, and that walking over the base's modules skips attached adapters."""

from __future__ import annotations

import pytest

import lorakit as lk
from lorakit.bench import attach
from lorakit.layers.updates.lora import LoraFactors
from lorakit.layers.walk import base_modules

pytest.importorskip("peft")


def test_attaching_gives_a_row_with_both_sides():
    row = attach._attach("attach", lambda: attach.llama(2, 64, 128, 4), rounds=1)
    assert row["times faster"] == pytest.approx(row["PEFT ms"] / row["lorakit ms"])
    assert row["lorakit ms"] > 0


def test_loading_switching_and_disabling_give_a_row_for_each_number():
    rows = attach._several(layers=1, counts=(1, 2), repeats=2)
    assert len(rows) == 6
    assert all(row["lorakit ms"] > 0 and row["PEFT ms"] > 0 for row in rows)


def test_base_modules_is_named_modules_without_lorakits_children():
    model = attach.llama(2, 64, 128, 4)
    model.same_again = model.model.layers[0].self_attn.q_proj
    before = [name for name, _ in model.named_modules()]
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for n in range(3):
        lk.attach(model, lk.LoraConfig(rank=2, save_modules=["lm_head"] if n == 0 else []), name=f"a{n}")
    assert sum(isinstance(m, LoraFactors) for m in model.modules()) == 3 * 14
    assert [name for name, _ in base_modules(model)] == before
    assert [name for name, _ in base_modules(model, every_name=True)] == every
