"""The table of LoHa, LoKr, VeRA and attention has all its figures, and its sides compute comparable things."""

from __future__ import annotations

import torch

from lorakit.bench import suite


def test_each_kind_has_its_row():
    rows = suite.measure("products", quick=True, precisions=(torch.float32,))
    assert [row["kind"] for row in rows] == ["loha", "lokr", "vera", "attention"]
    for row in rows:
        assert row["step, lorakit / PEFT"] > 0
        assert row["one token, lorakit / PEFT"] > 0
        assert row["lorakit kept MB"] > 0
