"""What wrappers leave in key names: read without, said in one line, and nothing taken from names that have none."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.formats.wrappers import unwrap

PLAIN = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DIT = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    "wrapped, plain",
    [
        ("base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight", PLAIN),
        ("_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", PLAIN),
        ("base_model.model.model.layers.0._orig_mod.self_attn.q_proj.lora_A.weight", PLAIN),
        ("module." + PLAIN, PLAIN),
        ("module.module." + PLAIN, PLAIN),
        ("_forward_module." + PLAIN, PLAIN),
        ("_fsdp_wrapped_module." + PLAIN, PLAIN),
        ("base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight", PLAIN),
        ("base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight", PLAIN),
        ("_module." + PLAIN, PLAIN),
        ("base_model.model.module.model.layers.0.self_attn.q_proj.lora_A.weight", PLAIN),
        ("base_model.model." + PLAIN, PLAIN),
        ("pretrained_model." + PLAIN, PLAIN),
        ("model." + PLAIN, PLAIN),
        (PLAIN.replace("lora_A.weight", "lora_A.default.weight"), PLAIN),
        ("_orig_mod.module." + PLAIN.replace("lora_A.weight", "lora_A.default.weight"), PLAIN),
        ("transformer.base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", DIT),
        ("transformer._orig_mod.transformer_blocks.0.attn.to_q.lora_A.weight", DIT),
        ("transformer.module.transformer_blocks.0.attn.to_q.lora_A.weight", DIT),
        ("transformer.transformer_blocks.0._orig_mod.attn.to_q.lora_A.weight", DIT),
        ("lora_unet__orig_mod_blocks_0_attn.alpha", "lora_unet_blocks_0_attn.alpha"),
        ("lora_unet_blocks_0__orig_mod_attn.alpha", "lora_unet_blocks_0_attn.alpha"),
    ],
)
def test_each_wrapper_of_the_field(wrapped, plain):
    found, removed = unwrap([wrapped])
    assert found == {wrapped: plain}
    assert removed


@pytest.mark.parametrize(
    "keys",
    [
        [PLAIN],
        [DIT],
        ["module_list.0.lora_A.weight", "module.1.lora_B.weight"],
        ["model.module.0.q.lora_A.weight"],
        ["lora_unet_blocks_0_attn.lora_down.weight"],
        ["layers.0.q.lora_A", "layers.0.q.lora_B"],
        ["base_model.model.x.lora_embedding_A"],
        ["base_model.model.classifier.modules_to_save.weight"],
        ["unet:0:up", "<s1>", "[0]"],
    ],
)
def test_names_without_wrappers_stay_as_they_are(keys):
    found, removed = unwrap(keys)
    assert found == {key: key for key in keys}
    assert removed == []


def test_a_peft_folder_from_a_compiled_model_is_read_said_and_exported_as_peft_reads_it(tmp_path, caplog, lorakit):
    import peft

    model = lk.attach(tiny.llama(), lk.LoraConfig(rank=2, targets=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    lk.capture(model).save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(
        {k.replace("base_model.model.", "base_model.model._orig_mod."): t for k, t in load_file(file).items()}, file
    )
    with caplog.at_level(logging.WARNING):
        adapter = lk.Adapter.load(tmp_path / "a")
    assert [r.getMessage() for r in caplog.records if r.name.startswith("lorakit")] == [
        f"{file}: read without what wrappers left in its key names: _orig_mod"
    ]
    assert all(not m.startswith("_orig_mod") for m in adapter.updates)
    code, out, _ = lorakit("export", str(tmp_path / "a"), str(tmp_path / "b"), "--for", "peft", "--fix", "--verify")
    assert code == 0
    assert "not checked: without a base (--base)" in out
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "b"))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_simpletuner_file_is_read_as_diffusers_would_write_it(tmp_path):
    """SimpleTuner's `transformer.base_model.model.`, in the suffixes of old diffusers."""
    m = "transformer.base_model.model.transformer_blocks.0.attn.to_q"
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    save_file({f"{m}.lora.down.weight": A, f"{m}.lora.up.weight": B}, tmp_path / "x.safetensors")
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    assert list(adapter.updates) == ["transformer.transformer_blocks.0.attn.to_q"]
    written = load_file(adapter.save(tmp_path / "y.safetensors", "diffusers"))
    assert set(written) == {f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight" for half in "AB"}


def test_two_adapters_in_one_file_and_two_keys_that_become_one_are_named(tmp_path):
    pair = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    m = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{m}.{h}.{n}.weight": t.clone() for h, t in pair.items() for n in ("one", "two")}, tmp_path / "x.safetensors"
    )
    with pytest.raises(AdapterError, match=r"x\.safetensors: its keys hold 2 adapters: one, two"):
        lk.Adapter.load(tmp_path / "x.safetensors")
    both = {f"{p}transformer.x_embedder.{h}.weight": t.clone() for h, t in pair.items() for p in ("", "_orig_mod.")}
    save_file(both, tmp_path / "y.safetensors")
    with pytest.raises(AdapterError, match=r"is a second 'transformer\.x_embedder\.lora_"):
        lk.Adapter.load(tmp_path / "y.safetensors")
