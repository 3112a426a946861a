"""PEFT's AdaLoRA, lora_bias, shards, eight bits and falsy config values, with the real PEFT as the judge."""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.biased import Biased
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError
from lorakit.formats import find

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(8)[None]


def randomised(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(config, tmp_path, base=tiny.llama):
    model = randomised(peft.get_peft_model(base(), config))
    model.save_pretrained(tmp_path)
    return model


def edited(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("pruned", [False, True])
def test_an_adalora_is_a_lora_with_its_singular_values_in_b(pruned, tmp_path):
    config = peft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], init_r=5, lora_alpha=3, total_step=10)
    model = randomised(peft.get_peft_model(tiny.llama(), config))
    if pruned:
        keep = [True, False, True, True, False]
        layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_E")}
        for layer in layers.values():
            layer.lora_E["default"].data[[1, 4]] = 0
        model.peft_config["default"].rank_pattern = {f"{n}.lora_E.default": keep for n in layers}
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    assert {f.rank for f in adapter.factors.values()} == {3 if pruned else 5}
    ours = lk.attach(tiny.llama(), adapter)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    again = lk.Adapter.load(adapter.save(tmp_path / "lora"))
    for module, f in adapter.factors.items():
        torch.testing.assert_close(again.factors[module].delta(), f.delta())


def test_an_adalora_without_one_of_its_tensors_is_named(tmp_path):
    saved(peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "lora_E" in k)
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj' has no lora_E"):
        lk.Adapter.load(tmp_path)


def test_lora_bias_is_read_merged_and_written_as_peft_has_it(tmp_path):
    """Of a model whose targets have biases, as PEFT asks."""
    config = peft.LoraConfig(target_modules=["query", "dense"], r=3, lora_alpha=6, lora_bias=True)
    model = saved(config, tmp_path / "lora", tiny.bert)
    adapter = lk.Adapter.load(tmp_path / "lora")
    assert all(isinstance(u, Biased) for u in adapter.updates.values())
    base = tiny.bert()
    base.save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    theirs = model.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)
    adapter.save(tmp_path / "again")
    for key, tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "again" / "adapter_model.safetensors")[key], tensor)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_bias"] is True


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_read_as_one_and_a_missing_one_is_named(with_index, tmp_path):
    saved(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2), tmp_path)
    whole = lk.Adapter.load(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    keys = sorted(tensors)
    parts = [keys[i::3] for i in range(3)]
    for name, part in zip(names, parts, strict=True):
        save_file({k: tensors[k] for k in part}, tmp_path / name)
    if with_index:
        index = {"weight_map": {k: name for name, part in zip(names, parts, strict=True) for k in part}}
        (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert find(tmp_path) == tmp_path
    again = lk.Adapter.load(tmp_path)
    assert again.updates.keys() == whole.updates.keys()
    for module, f in whole.factors.items():
        assert torch.equal(again.factors[module].B, f.B)
    (tmp_path / names[1]).unlink()
    with pytest.raises(AdapterError, match=rf"1 of 3 shards are not there: {names[1]}"):
        lk.Adapter.load(tmp_path)
    if with_index:
        (tmp_path / "adapter_model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
        with pytest.raises(AdapterError, match="weight_map is"):
            lk.Adapter.load(tmp_path)


def test_factors_in_eight_bits(tmp_path):
    saved(peft.LoraConfig(target_modules=["q_proj"], r=2), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    eight = {k: t.to(torch.float8_e4m3fn) for k, t in load_file(file).items()}
    save_file(eight, file)
    for module, f in lk.Adapter.load(tmp_path).factors.items():
        assert torch.equal(f.B.float(), eight[f"base_model.model.{module}.lora_B.weight"].float())


FALSY = [None, False, "", [], {}]
FIELDS = ["exclude_modules", "layers_to_transform", "modules_to_save", "rank_pattern", "alpha_pattern", "revision"]
FIELDS += ["layers_pattern", "task_type", "base_model_name_or_path", "use_rslora", "target_parameters", "lora_bias"]
FIELDS += ["trainable_token_indices", "layer_replication", "loftq_config", "megatron_config", "alora_invocation_tokens"]
FIELDS += ["bias", "fan_in_fan_out", "use_dora", "eva_config", "enable_lora", "lora_dropout", "init_lora_weights"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_falsy_value_means_not_given_as_in_peft(field, tmp_path):
    saved(peft.LoraConfig(target_modules=["q_proj"], r=2), tmp_path)
    plain = lk.Adapter.load(tmp_path)
    for value in FALSY:
        edited(tmp_path, **{field: value})
        adapter = lk.Adapter.load(tmp_path)
        for module, f in plain.factors.items():
            assert torch.equal(adapter.factors[module].delta(), f.delta()), (field, value)


def test_layer_zero_and_alpha_zero_are_numbers_and_no_falsy_values(tmp_path):
    saved(peft.LoraConfig(target_modules=["q_proj"], r=2, layers_to_transform=[0]), tmp_path)
    edited(tmp_path, layers_to_transform=0)
    assert lk.Adapter.load(tmp_path).config.layers == [0]
    edited(tmp_path, lora_alpha=0)
    with pytest.raises(AdapterError, match=r"LoraConfig\.alpha"):
        lk.Adapter.load(tmp_path)


def test_a_lora_written_as_adalora_computes_the_same_in_pefts_adalora(tmp_path):
    """With modules of several ranks and scales, and entries that are zero."""
    config = lk.LoraConfig(rank=4, alpha=3, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    ours = tiny.randomise_factors(lk.attach(tiny.llama(), config))
    with torch.no_grad():
        next(p for n, p in ours.named_parameters() if n.endswith("lora_default.B"))[:, 1] = 0
    adapter = lk.capture(ours)
    folder = adapter.save(tmp_path / "adalora", format="adalora")
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), folder).eval()
    assert type(theirs.base_model).__name__ == "AdaLoraModel"
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-5)
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(parameter.norm(dim=1), torch.ones(len(parameter)))
    again = lk.Adapter.load(folder)
    assert {m: f.rank for m, f in again.factors.items()} == {m: f.rank for m, f in adapter.factors.items()}
    for module, f in adapter.factors.items():
        torch.testing.assert_close(again.factors[module].delta(), f.delta(), atol=1e-6, rtol=1e-5)


def test_what_pefts_adalora_cannot_hold_is_named_and_nothing_written(tmp_path):
    config = lk.LoraConfig(rank=2, targets=["embed_tokens"])
    adapter = lk.capture(tiny.randomise_factors(lk.attach(tiny.llama(), config)))
    with pytest.raises(AdapterError, match=r"convolutions or embeddings \(model\.embed_tokens\)"):
        adapter.save(tmp_path / "no", format="adalora")
    assert not (tmp_path / "no").exists()
