"""The sides of the DoRA table compute the same, and the table has a row for each thing it measures."""

from __future__ import annotations

import torch

from lorakit.bench import dora, suite


def test_both_libraries_compute_the_same_adapter():
    models = dora.sides(dora.linear(32, torch.float32, torch.device("cpu")), ["0"])
    for ours, theirs in ((dora.LORA, dora.PEFT_LORA), (dora.DORA, dora.PEFT_DORA)):
        state = models[theirs].base_model.model[0].state_dict()
        update = models[ours][0].lora_default
        with torch.no_grad():
            for name, parameter in update.named_parameters():
                part = "magnitude" if name == "magnitude" else f"lora_{name[-1]}."
                parameter.copy_(next(t for key, t in state.items() if part in key).view_as(parameter))
        x = torch.randn(3, 32)
        torch.testing.assert_close(models[ours](x), models[theirs](x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(models[ours](x), models["base"](x), atol=1e-4)


def test_the_quick_table_has_times_ratios_and_bytes():
    rows = suite.measure("dora", quick=True, precisions=(torch.float32,))
    assert [row["what"].split()[0] for row in rows] == ["step", "one", "merge", "step"]
    for row in rows:
        assert row["DoRA / LoRA"] > 0
    assert all(row["DoRA kept MB"] >= row["LoRA kept MB"] > 0 for row in (rows[0], rows[3]))
    assert rows[1]["PEFT DoRA, cached ms"] > 0
    assert suite.table(rows)
