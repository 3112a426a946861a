"""doctor's report of fused parts covers every architecture, and survives a transformers release that breaks one."""

from __future__ import annotations

import pytest
import torch

from lorakit.doctor import fused


@pytest.fixture(scope="module")
def rows():
    return fused.fused_report()


def test_every_architecture_is_reported(rows):
    assert {row.model for row in rows} == set(fused.MODELS)
    assert all(row.fused == (row.why == "") for row in rows)


@pytest.mark.parametrize("model", ["Llama", "Mistral", "Qwen3", "Gemma 3", "Phi-3"])
def test_every_part_of_a_decoder_is_fused(rows, model):
    fused_parts = {row.part.split(" (")[0] for row in rows if row.model == model and row.fused}
    assert fused_parts == {"linear with its update", "gated MLP", "RMSNorm", "attention's backward"}


def test_a_part_that_is_not_fused_has_a_reason(rows):
    assert {row.why for row in rows if row.model == "BERT" and not row.fused} == {"its attention is not causal"}


def test_an_architecture_that_cannot_be_built_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(fused, "MODELS", {"New": ("LlamaConfig", "NoSuchModel", {})})
    (row,) = fused.fused_report()
    assert not row.fused
    assert "NoSuchModel" in row.why


def test_the_report_does_not_change_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fused.fused_report()
    assert torch.equal(torch.get_rng_state(), before)
