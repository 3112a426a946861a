"""The sides of the latency table compute what their names say."""

from __future__ import annotations

import pytest
import torch

from lorakit.bench import latency

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sides():
    return latency.sides(latency.gpt2(32, 2, 2, CPU))


def output(model):
    ids = torch.arange(10).view(1, 10)
    with torch.inference_mode():
        return model(ids, use_cache=False).last_hidden_state


def test_merged_equals_unmerged_and_every_adapter_changes_the_output(sides):
    base = output(sides["base"])
    torch.testing.assert_close(output(sides["LoRA, merged"]), output(sides["LoRA q,v"]), atol=1e-5, rtol=0)
    for name in set(sides) - {"base"}:
        assert (output(sides[name]) - base).abs().max() > 1e-4, name


def test_merged_runs_the_bases_own_modules(sides):
    layer = sides["LoRA, merged"].h[0].attn.c_attn
    assert layer.lora_in_use() == []
    assert sides["LoRA q,v"].h[0].attn.c_attn.lora_in_use() != []


@pytest.mark.parametrize("kind, blocks", [("H", 2), ("L", 1)])
def test_bottlenecks_have_the_papers_number_and_size(kind, blocks):
    model = latency.gpt2(1024, 1, 16, CPU)
    before = sum(p.numel() for p in model.parameters())
    latency.with_bottlenecks(model, kind)
    assert sum(isinstance(m, latency.Bottleneck) for m in model.modules()) == blocks
    added = 24 * (sum(p.numel() for p in model.parameters()) - before)
    assert added == pytest.approx(11e6, rel=0.03)  # GPT-2 medium's, with 24 layers


def test_the_quick_table_has_a_base_and_a_slowdown_for_each_side(tmp_path, sides):
    from lorakit.bench import suite

    rows = suite.measure("latency", quick=True)
    assert all(row["base ms"] > 0 and len([c for c in row if c.endswith("+%")]) == len(sides) - 1 for row in rows)
    assert suite.save_plot("latency", rows, tmp_path).stat().st_size > 5000
