"""Factors of experts in PEFT's folder: what its config says of them, and files that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_experts import adapted, logits, moe
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.experts import ExpertFactors
from lorakit.errors import AdapterError

EXPERTS = "model.layers.0.mlp.experts"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "adapter"
    return lk.capture(adapted("mixtral", targets=["q_proj", "experts"], layers=[0])).save(folder)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def config(folder: Path, **changes) -> dict:
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))
    return values


def tensors(folder: Path, change) -> None:
    found = load_file(folder / WEIGHTS)
    save_file(change(dict(found)), folder / WEIGHTS, {"format": "pt"})


def test_its_config_names_parameters_and_modules_apart(folder):
    values = config(folder)
    assert values["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert values["target_parameters"] == [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"]
    assert values["peft_type"] == "LORA"
    keys = {k.removeprefix("base_model.model.") for k in load_file(folder / WEIGHTS)}
    assert keys == {
        f"{front}.lora_{half}.weight"
        for front in (EXPERTS, f"{EXPERTS}.base_layer", "model.layers.0.self_attn.q_proj")
        for half in "AB"
    }


def test_endings_stay_endings(tmp_path):
    lk.capture(adapted("mixtral", targets=["q_proj", "down_proj"])).save(tmp_path)
    values = config(tmp_path)
    assert values["target_modules"] == ["q_proj"]
    assert values["target_parameters"] == ["experts.down_proj"]
    assert lk.Adapter.load(tmp_path).config.targets == ["experts.down_proj", "q_proj"]


def test_read_back_every_bit_is_the_same(saved):
    adapter = lk.Adapter.load(saved)
    model = adapted("mixtral", targets=["q_proj", "experts"], layers=[0])
    expected = lk.capture(model)
    assert adapter.digest() == expected.digest()
    assert torch.equal(logits(lk.attach(moe("mixtral"), adapter)), logits(model))


def test_dropout_which_peft_refuses_is_kept_beside_it(tmp_path):
    lk.capture(adapted("mixtral", dropout=0.25)).save(tmp_path)
    assert config(tmp_path)["lora_dropout"] == 0
    assert lk.Adapter.load(tmp_path).config.dropout == 0.25
    again = lk.Adapter.load(tmp_path)
    assert "dropout" not in again.metadata
    lk.capture(adapted("mixtral", dropout=0.25, exclude=["experts"])).save(tmp_path / "linears")
    assert config(tmp_path / "linears")["lora_dropout"] == 0.25


def test_a_transposed_layout_is_known_again(tmp_path):
    adapter = lk.capture(adapted("gpt_oss", targets=["experts"]))
    assert all(u.transposed for u in adapter.updates.values())
    again = lk.Adapter.load(adapter.save(tmp_path))
    assert all(u.transposed for u in again.updates.values())
    assert "transposed_experts" not in again.metadata


def test_a_pattern_for_modules_is_kept_beside_parameters(folder):
    config(folder, target_modules=r".*\.q_proj")
    adapter = lk.Adapter.load(folder)
    assert len(adapter.updates) == 3
    fresh = lk.attach(moe("mixtral"), adapter.config.replace(rank=2))
    assert lk.capture(fresh).updates.keys() == {*adapter.updates, "model.layers.1.self_attn.q_proj"}


def test_a_parameter_called_weight_is_its_modules(folder):
    """PEFT's target_parameters may name a linear's weight; its keys are the linear's then."""
    values = config(folder)
    config(folder, target_modules=[], target_parameters=[*values["target_parameters"], "q_proj.weight"])
    adapter = lk.Adapter.load(folder)
    assert sorted(type(u).__name__ for u in adapter.updates.values()) == ["ExpertFactors", "ExpertFactors", "Factors"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"target_parameters": [f"{EXPERTS}.down_proj"]},
            r"2 pairs of factors for its parameters, and target_parameters names \['down_proj'\]",
        ),
        ({"target_parameters": [f"{EXPERTS}.a", f"{EXPERTS}.b"]}, r"names \['a', 'b'\].*does not say which"),
        ({"r": 5}, r"'.*' has A .*its config says rank 5"),
        ({"target_parameters": ["other.down_proj"]}, r"target_parameters names \[\] of it"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_tensors_is_an_error(folder, changes, said):
    config(folder, **changes)
    with pytest.raises(AdapterError, match=rf"(?s){said}"):
        lk.Adapter.load(folder)


def test_a_missing_half_is_named(folder):
    key = f"base_model.model.{EXPERTS}.lora_B.weight"
    tensors(folder, lambda found: {k: t for k, t in found.items() if k != key})
    with pytest.raises(AdapterError, match=rf"'{EXPERTS}.down_proj' has no lora_B"):
        lk.Adapter.load(folder)


def test_other_shapes_are_named(folder):
    key = f"base_model.model.{EXPERTS}.lora_A.weight"
    tensors(folder, lambda found: found | {key: found[key][:-1].clone()})
    with pytest.raises(AdapterError, match=r"\[experts x 3, in\] and \[out, 3 x experts\] were expected"):
        lk.Adapter.load(folder)


def test_what_pefts_keys_cannot_tell_apart_is_not_written(tmp_path):
    factors = ExpertFactors(torch.ones(2, 2, 4), torch.ones(2, 4, 2), 2.0)
    updates = {f"{EXPERTS}.{name}": factors for name in ("w1", "w3")}
    adapter = lk.Adapter(lk.LoraConfig(targets=["w1", "w3"]), updates)
    with pytest.raises(AdapterError, match=r"do not tell \['w1', 'w3'\]"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_verified_by_independent_code(saved, tmp_path):
    from lorakit.export.verify import contents, differences

    adapter = lk.Adapter.load(saved)
    found = differences(*contents(saved, "peft", adapter), saved)
    assert found["ΔW"] < 1e-6
    wrong = {n: u.map(lambda name, t: t.flip(0) if name == "B" else t) for n, u in adapter.updates.items()}
    other = lk.Adapter(adapter.config, wrong).save(tmp_path / "other")
    assert differences(*contents(other, "peft", adapter), other)["ΔW"] > 0.1


@pytest.mark.parametrize("receiver", ["vllm", "sglang", "llama.cpp", "canonical"])
def test_programs_that_have_no_place_for_them_are_named_with_what_to_do(saved, receiver):
    from lorakit.export.rules import findings

    adapter = lk.Adapter.load(saved)
    found = [f for f in findings(adapter, receiver) if "factors of each expert" in str(f)]
    assert len(found) == 1
    assert set(found[0].into_base) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}


def test_an_export_for_peft_compares_the_logits(tmp_path):
    from lorakit.export.export import export

    moe("gpt_oss").save_pretrained(tmp_path / "base")
    adapter = lk.capture(adapted("gpt_oss"))
    result = export(adapter, tmp_path / "out", "peft", base=tmp_path / "base", verify=True)
    assert result.logits.relative < 1e-5
    assert result.logits.moved > 1e-3


def test_an_export_for_vllm_merges_the_experts_into_a_copy_of_the_base(tmp_path):
    """vLLM reads LoRA of linears: with --fix the experts' part goes into OUT-base, the rest stays an adapter."""
    from lorakit.export.export import export

    moe("mixtral").save_pretrained(tmp_path / "base")
    adapter = lk.capture(adapted("mixtral", rank=8))
    with pytest.raises(AdapterError, match=r"vllm does not accept .*\n.*factors of each expert"):
        export(adapter, tmp_path / "out", "vllm", base=tmp_path / "base")
    result = export(adapter, tmp_path / "out", "vllm", base=tmp_path / "base", fix=True, verify=True)
    assert result.logits.relative < 1e-5
    rest = lk.Adapter.load(tmp_path / "out")
    assert {n.rpartition(".")[2] for n in rest.updates} == {"q_proj", "k_proj", "v_proj", "o_proj"}
