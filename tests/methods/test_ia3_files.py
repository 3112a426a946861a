"""(IA)³ in files: merged into a checkpoint, looked at, and what a bottleneck adapter refuses there."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.analysis.inspect import describe_adapter
from lorakit.checkpoint.merge import merge_checkpoint
from lorakit.errors import AdapterError


@pytest.fixture(params=["gpt2", "llama"])
def base(request, tmp_path):
    """A model's folder: GPT-2's linears are stored as [in, out] and have biases, Llama's have none."""
    model = getattr(tiny, request.param)()
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_on(base, **settings) -> tuple[torch.nn.Module, lk.Adapter]:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    lk.attach(model, lk.LoraConfig(**settings))
    tiny.randomise_factors(model)
    return model, lk.capture(model)


def test_merged_into_a_checkpoint_it_computes_the_same(base, tmp_path):
    model, adapter = adapter_on(base, variant="ia3", targets="ia3")
    merge_checkpoint(base, adapter.save(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert (tiny.logits(merged) - tiny.logits(plain)).abs().max() > 1e-3


def test_a_file_of_pefts_without_the_other_sizes_merges_too(base, tmp_path):
    model, adapter = adapter_on(base, variant="ia3", targets="ia3")
    folder = adapter.save(tmp_path / "adapter")
    (folder / "lorakit.json").unlink()
    merge_checkpoint(base, folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=1e-4, atol=1e-5)


def test_a_bottleneck_is_refused_with_the_reason_and_nothing_is_written(base, tmp_path):
    _, adapter = adapter_on(base, variant="bottleneck", targets="houlsby", rank=2)
    with pytest.raises(AdapterError, match=r"non-linearity(.|\n)*beside its base"):
        merge_checkpoint(base, adapter.save(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("variant", ["ia3", "bottleneck"])
def test_it_can_be_looked_at(base, tmp_path, variant):
    targets = "ia3" if variant == "ia3" else "houlsby"
    _, adapter = adapter_on(base, variant=variant, targets=targets)
    folder = adapter.save(tmp_path / "adapter")
    facts = describe_adapter(lk.Adapter.load(folder), str(folder))
    assert len(facts.modules) == len(adapter.updates)
    assert not any(module.dead for module in facts.modules)
    assert {module.kind for module in facts.modules} == {variant}
    assert all(module.norm > 0 for module in facts.modules)
