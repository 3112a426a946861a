"""The sides of the table of starts compute the same, and the table has a row for each thing it measures."""

from __future__ import annotations

import torch

from lorakit.bench import dora, starts, suite


def test_both_libraries_have_the_same_weight_to_start_from():
    base = dora.linear(32, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 32)
    for init in starts.INITS:
        for model in (starts.ours(base, ["0"], init), starts.theirs(base, ["0"], init)):
            torch.testing.assert_close(model(x), base(x), rtol=1e-4, atol=1e-5)


def test_the_quick_table_has_times_ratios_and_bytes():
    rows = suite.measure("starts", quick=True, precisions=(torch.float32,))
    assert [row["what"].split()[0] for row in rows] == ["attach,", "attach,", "step", "step"]
    assert all(row["PiSSA / PEFT PiSSA"] > 0 for row in rows)
    assert all(row["PiSSA kept MB"] > 0 for row in rows[2:])
    assert suite.table(rows)
