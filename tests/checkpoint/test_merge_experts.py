"""Adapters of experts merged into checkpoints: a file tensor for each expert, or stacked ones."""

from __future__ import annotations

import pytest
import torch
from made_experts import LAYOUTS, adapted, logits, moe
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.checkpoint.merge import merge_checkpoint
from lorakit.errors import AdapterError, TargetError
from lorakit.io.stream import read_header


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("architecture", LAYOUTS)
def test_a_merged_checkpoint_computes_what_the_adapter_does(architecture, stacked, tmp_path):
    moe(architecture).save_pretrained(tmp_path / "base", save_original_format=not stacked)
    model = adapted(architecture)
    adapter = lk.capture(model)
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    assert report.untouched < report.tensors
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(model), atol=1e-5, rtol=0)
    before, after = (read_header(tmp_path / name / "model.safetensors")[0] for name in ("base", "merged"))
    assert before.keys() == after.keys()
    assert {n: s.shape for n, s in before.items()} == {n: s.shape for n, s in after.items()}


def test_each_experts_matrix_is_reported_by_its_own_name(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    adapter = lk.capture(adapted("mixtral", targets=["experts"], layers=[0]))
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    found = {t.module for t in report.targets}
    names = {n.removesuffix(".weight") for n in read_header(tmp_path / "base" / "model.safetensors")[0]}
    assert found == {n for n in names if ".layers.0." in n and ".experts." in n}
    assert len(found) == 3 * 4


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_two_adapters_add_up_in_the_files(architecture, tmp_path):
    moe(architecture).save_pretrained(tmp_path / "base")
    first = adapted(architecture, targets=["gate_up_proj", "q_proj"])
    a = lk.capture(first)
    b = lk.capture(adapted(architecture, targets=["down_proj", "gate_up_proj"], rank=2))
    lk.attach(first, b, "b")
    lk.activate(first, {"default": 0.5, "b": -1.0})
    merge_checkpoint(tmp_path / "base", [a, b], tmp_path / "merged", weights=[0.5, -1.0])
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(first), atol=1e-5, rtol=0)


def test_square_matrices_are_laid_out_as_the_others_of_their_experts(tmp_path):
    """gpt-oss: down_proj is [E, 2880, 2880], whose shape does not say that it is transposed."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = GptOssConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, **sizes
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "base")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["experts"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    lk.capture(model).save(tmp_path / "adapter")
    notes = tmp_path / "adapter" / "lorakit.json"
    notes.write_text("{}")  # as PEFT leaves it: nothing says which way round
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "w")
    from safetensors.torch import load_file, save_file

    save_file(load_file(tmp_path / "w"), tmp_path / "adapter" / "adapter_model.safetensors")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(model), atol=1e-5, rtol=0)


def test_experts_of_another_model_are_refused_and_nothing_is_written(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    adapter = lk.capture(adapted("qwen2_moe"))
    with pytest.raises((TargetError, AdapterError)):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", force_base=True)
    assert not (tmp_path / "merged").exists()


def test_inspect_measures_them_against_the_base(tmp_path):
    from lorakit.analysis.inspect import describe_adapter

    moe("mixtral").save_pretrained(tmp_path / "base")
    model = adapted("mixtral")
    adapter = lk.capture(model)
    facts = describe_adapter(adapter, "-", base=tmp_path / "base")
    by_name = {m.name: m for m in facts.modules}
    for name, update in adapter.updates.items():
        W = moe("mixtral").get_parameter(update.weight_name(name))
        wanted = update.delta().norm() / W.detach().norm()
        assert by_name[name].relative == pytest.approx(float(wanted), rel=1e-4)
    assert not facts.unlike_base


def test_the_table_has_one_line_for_all_experts_of_a_kind(tmp_path):
    from lorakit.analysis.merge_tables import tables

    moe("mixtral").save_pretrained(tmp_path / "base")
    report = merge_checkpoint(tmp_path / "base", lk.capture(adapted("mixtral")), tmp_path / "merged")
    (table, *_) = tables(report)
    rows = {row[0]: row[1] for row in table.cells}
    assert {name: count for name, count in rows.items() if "experts" in name} == {
        f"block_sparse_moe.experts.*.{w}": "8" for w in ("w1", "w2", "w3")
    }


def test_what_extract_finds_between_two_checkpoints_attaches_to_the_stacks(tmp_path):
    from lorakit.checkpoint.extract import extract

    moe("mixtral").save_pretrained(tmp_path / "base")
    model = adapted("mixtral")
    merge_checkpoint(tmp_path / "base", lk.capture(model), tmp_path / "tuned")
    found = extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    assert found.captured > 0.9999
    again = lk.attach(moe("mixtral"), found.adapter, force=True)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-3, rtol=0)
