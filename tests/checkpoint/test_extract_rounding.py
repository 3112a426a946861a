"""Extracting from a checkpoint in 16 bits says which part of the rank is rounding, and what to do."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.checkpoint.extract import extract
from lorakit.checkpoint.merge import merge_checkpoint

RANK = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and merges of one adapter of rank 3 into it, in several precisions."""
    root = tmp_path_factory.mktemp("rounded")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(root / "base")
    model = lk.attach(base.float(), lk.LoraConfig(rank=RANK, alpha=RANK))
    adapter = lk.capture(tiny.randomise_factors(model, size=0.05))
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        merge_checkpoint(root / "base", [adapter], root / dtype, dtype=kind)
    return root


def signal(base, tuned, module) -> int:
    """How many singular values in float64 stand out of the rest by a factor of two."""
    from safetensors.torch import load_file

    before, after = (load_file(f / "model.safetensors")[f"{module}.weight"].double() for f in (base, tuned))
    S = torch.linalg.svdvals(after - before)
    return int((S[:-1] / S[1:]).argmax()) + 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("asked", [{"keep": 1 - 1e-9}, {"rank": 12}], ids=str)
def test_the_rank_that_is_rounding_is_counted_and_the_real_one_named(folders, dtype, asked):
    found = extract(folders / "base", folders / dtype, **asked)
    for module in (m for m in found.modules if m.module.startswith("model.layers")):
        assert module.rank > RANK
        assert module.rank - module.noise == signal(folders / "base", folders / dtype, module.module) == RANK
    (note,) = [w for w in found.warnings if "rounding (" in w]
    assert re.search(r"in \d of \d modules some of the rank found is that of its rounding", note)
    assert f"--rank {RANK}" in note
    assert "--dtype fp32" in note
    again = extract(folders / "base", folders / dtype, rank=RANK)
    assert not any(m.noise for m in again.modules if m.module.startswith("model.layers"))
    assert found.to_dict()["modules"][0]["noise"] == found.modules[0].noise


def test_a_merge_in_float32_has_no_noise_to_speak_of(folders):
    found = extract(folders / "base", folders / "fp32", keep=0.999999)
    assert {m.rank for m in found.modules} == {RANK}
    assert not any(m.noise for m in found.modules)
    assert not [w for w in found.warnings if "rounding (" in w]


def test_a_change_of_full_rank_is_not_taken_for_noise(folders, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    found = extract(folders / "base", tmp_path, rank=16)
    assert not any(m.noise for m in found.modules)


def test_rounding_alone_is_called_that(folders, tmp_path):
    """A fine-tune in float32 that changed nothing, stored in 16 bits."""
    model = LlamaForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand_like(parameter) * 0.003)
    model.save_pretrained(tmp_path / "fine")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    found = extract(tmp_path / "fine", tmp_path / "rounded", rank=8)
    assert all(m.noise == m.rank for m in found.modules)
    assert any("nothing of the change can be told from it" in w for w in found.warnings)
