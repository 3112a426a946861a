"""Adapters of single experts (as transformers 4 had them) on models that stack experts: as PEFT converts them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from made_experts import logits, moe
from safetensors.torch import save_file

import lorakit as lk
from lorakit.adapter.dora import Dora
from lorakit.adapter.experts import ExpertFactors
from lorakit.checkpoint.merge import merge_checkpoint
from lorakit.errors import AdapterError

MIXTRAL = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
QWEN = "model.layers.{layer}.mlp.experts.{expert}.{name}"


def randn(*shape: int, seed: int) -> torch.Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, pattern: str, names: tuple[str, ...], hidden: int, inner: int, **changes) -> Path:
    """An adapter of rank 2 on each of 4 experts' matrices in two layers, as PEFT wrote it with transformers 4."""
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for i, name in enumerate(names):
                key = "base_model.model." + pattern.format(layer=layer, expert=expert, name=name)
                down = name in ("w2", "down_proj")
                seed = 100 * layer + 10 * expert + i
                tensors[f"{key}.lora_A.weight"] = randn(2, inner if down else hidden, seed=seed)
                tensors[f"{key}.lora_B.weight"] = randn(hidden if down else inner, 2, seed=seed + 1000)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(names), "task_type": "CAUSAL_LM"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("architecture", "pattern", "names", "inner"),
    [("mixtral", MIXTRAL, ("w1", "w2", "w3"), 48), ("olmoe", QWEN, ("gate_proj", "up_proj", "down_proj"), 48)],
)
def test_they_join_to_the_stacks_as_in_peft(architecture, pattern, names, inner, tmp_path):
    if architecture == "olmoe":
        from transformers import OlmoeConfig, OlmoeForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = OlmoeConfig(vocab_size=60, num_experts=4, num_experts_per_tok=2, num_key_value_heads=2, **sizes)

        def make():
            torch.manual_seed(0)
            return OlmoeForCausalLM(config).eval()
    else:

        def make():
            return moe(architecture)

    folder = write(tmp_path / "adapter", pattern, names, 32, inner)
    ours = lk.attach(make(), lk.Adapter.load(folder))
    found = lk.capture(ours)
    assert {n.rpartition(".")[2]: u.rank for n, u in found.updates.items()} == {"gate_up_proj": 4, "down_proj": 2}
    assert all(isinstance(u, ExpertFactors) for u in found.updates.values())
    base = make()
    with torch.no_grad():
        for name, update in lk.Adapter.load(folder).updates.items():
            layer, expert, last = int(name.split(".")[2]), int(name.split(".")[5]), name.rpartition(".")[2]
            experts = base.model.layers[layer].mlp.experts
            if last in ("w2", "down_proj"):
                experts.down_proj[expert] += update.delta()
            else:
                rows = slice(0, inner) if last in ("w1", "gate_proj") else slice(inner, 2 * inner)
                experts.gate_up_proj[expert, rows] += update.delta()
    torch.testing.assert_close(logits(ours), logits(base), atol=2e-6, rtol=0)
    theirs = peft.PeftModel.from_pretrained(make(), folder).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-6, rtol=0)


def test_experts_that_the_adapter_leaves_alone_are_unchanged_and_ranks_may_differ(tmp_path):
    adapter = lk.Adapter.load(write(tmp_path / "adapter", MIXTRAL, ("w1", "w2", "w3"), 32, 48))
    some = {n: u for n, u in adapter.updates.items() if ".experts.1." in n or n.endswith("experts.3.w2")}
    some = {n: u if n.endswith("w2") else lk.Factors(u.A[:1], u.B[:, :1], 4.0) for n, u in some.items()}
    found = lk.capture(lk.attach(moe("mixtral"), lk.Adapter(adapter.config, some))).updates
    gate_up, down = (found[f"model.layers.0.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj"))
    for e in range(4):
        assert bool(gate_up.delta()[e].any()) is (e == 1)
        assert bool(down.delta()[e].any()) is (e in (1, 3))
    name = MIXTRAL.format(layer=0, expert=1, name="w3")
    torch.testing.assert_close(gate_up.delta()[1, 48:], some[name].delta())


def test_they_merge_into_the_files_that_have_their_names(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    folder = write(tmp_path / "adapter", MIXTRAL, ("w1", "w2", "w3"), 32, 48)
    merge_checkpoint(tmp_path / "base", folder, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ours = lk.attach(moe("mixtral"), lk.Adapter.load(folder))
    torch.testing.assert_close(logits(merged), logits(ours), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_named_and_the_model_left_alone(tmp_path):
    adapter = lk.Adapter.load(write(tmp_path / "adapter", MIXTRAL, ("w1", "w3"), 32, 40))
    model = moe("mixtral")
    before = [type(m) for m in model.modules()]
    with pytest.raises(AdapterError, match=r"experts\.0\.w1' and its kind are \[48, 32\].*for \[40, 32\]"):
        lk.attach(model, adapter)
    own = next(iter(adapter.updates))
    dora = lk.Adapter(adapter.config, {own: Dora(adapter.updates[own], torch.ones(40, 1))})
    with pytest.raises(AdapterError, match=rf"'{own}' is an expert of .*plain LoRA only"):
        lk.attach(model, dora)
    assert [type(m) for m in model.modules()] == before
