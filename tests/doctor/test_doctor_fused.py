"""What doctor says of fused parts: every architecture is looked at, what is fused is, and a release that breaks one is a notice."""

from __future__ import annotations

import pytest
import torch

from lorakit.doctor import fused


@pytest.fixture(scope="module")
def rows():
    return fused.fused_report()


def test_every_architecture_is_there(rows):
    assert {row.model for row in rows} == set(fused.MODELS)
    assert all(row.fused == (row.why == "") for row in rows)


@pytest.mark.parametrize("model", ["Llama", "Mistral", "Qwen3", "Gemma 3", "Phi-3"])
def test_decoders_are_fused_throughout(rows, model):
    found = {row.part.split(" (")[0] for row in rows if row.model == model and row.fused}
    assert found == {"linear with its update", "gated MLP", "RMSNorm", "attention's backward"}


def test_what_does_not_apply_has_its_reason(rows):
    assert {row.why for row in rows if row.model == "BERT" and not row.fused} == {"its attention is not causal"}


def test_a_model_that_a_release_cannot_build_is_a_line_and_no_error(monkeypatch):
    monkeypatch.setattr(fused, "MODELS", {"New": ("LlamaConfig", "NoSuchModel", {})})
    (row,) = fused.fused_report()
    assert not row.fused
    assert "NoSuchModel" in row.why


def test_the_random_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fused.fused_report()
    assert torch.equal(torch.get_rng_state(), before)
