"""Files of other trainers: numpy's archives, mlx-vlm, torchtune, litgpt, Lightning, XLabs and BFL; renamed files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.formats import format_of
from lorakit.formats.families import family_of

conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
Q = "model.layers.0.self_attn.q_proj"


def pair(inputs: int = 32, out: int = 32, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r]."""
    return torch.randn(rank, inputs), torch.randn(out, rank)


def through(f) -> torch.Tensor:
    return f.scale * f.B @ (f.A @ torch.linspace(-1, 1, f.A.shape[1]))


def test_mlx_archive_of_numpy(tmp_path):
    """mlx-examples' `mx.savez("adapters.npz", ...)`: no config, the scale 20 is in its code."""
    A, B = pair()
    file = tmp_path / "adapters.npz"
    np.savez(file, **{f"{Q}.lora_a": A.T.numpy(), f"{Q}.lora_b": B.T.numpy()})
    with pytest.raises(AdapterError, match=r"(?s)without its adapter_config\.json.*--alpha"):
        lk.Adapter.load(file)
    for source in (file, tmp_path):
        f = lk.Adapter.load(source, alpha=20 * 4).factors[Q]
        torch.testing.assert_close(f.delta(), 20 * B @ A)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}})
    )
    assert format_of(tmp_path) == "mlx"
    torch.testing.assert_close(lk.Adapter.load(tmp_path).factors[Q].delta(), 2 * B @ A)


def test_numpys_archive_runs_no_code_and_takes_no_memory_on_trust(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    np.savez(tmp_path / "a.npz", **{f"{Q}.lora_a": np.array([Evil()], dtype=object)})
    with pytest.raises(AdapterError, match=r"allow_pickle=False|Object arrays"):
        lk.Adapter.load(tmp_path / "a.npz", alpha=1)
    np.savez_compressed(tmp_path / "b.npz", **{f"{Q}.lora_a": np.zeros((4096, 4096), np.float32)})
    with pytest.raises(AdapterError, match="would unpack to"):
        lk.Adapter.load(tmp_path / "b.npz", alpha=1)
    (tmp_path / "c.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:100])
    with pytest.raises(AdapterError):
        lk.Adapter.load(tmp_path / "c.npz", alpha=1)


def test_mlx_vlms_folder(tmp_path):
    """Its layer adds alpha · (x A) B."""
    A, B = pair()
    name = f"language_model.{Q}"
    save_file({f"{name}.A": A.T.contiguous(), f"{name}.B": B.T.contiguous()}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank": 4, "alpha": 0.1, "dropout": 0.0}))
    f = lk.Adapter.load(tmp_path).factors[name]
    torch.testing.assert_close(f.delta(), 0.1 * B @ A)


@pytest.mark.parametrize("container", [None, "model", "state_dict"])
@pytest.mark.parametrize("a, b", [("lora_a.weight", "lora_b.weight"), ("lora_A", "lora_B")])
def test_torchtune_litgpt_and_lightning(container, a, b, tmp_path):
    A, B = pair()
    name = "layers.0.attn.q_proj"
    tensors = {f"{name}.{a}": A, f"{name}.{b}": B}
    beside = {"epoch": 3, "optimizer": {"state": {}}, "hyper_parameters": {"lora_alpha": 16}}
    torch.save(tensors if container is None else {container: tensors, **beside}, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="does not hold alpha"):
        lk.Adapter.load(tmp_path / "x.pt")
    f = lk.Adapter.load(tmp_path / "x.pt", alpha=16).factors[name]
    torch.testing.assert_close(f.delta(), 4 * B @ A)


def test_torchtunes_dora_is_refused_and_not_saved_as_a_weight(tmp_path):
    A, B = pair()
    q = "layers.0.attn.q_proj"
    torch.save({f"{q}.lora_a.weight": A, f"{q}.lora_b.weight": B, f"{q}.magnitude": torch.ones(32)}, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="torchtune's DoRA"):
        lk.Adapter.load(tmp_path / "x.pt", alpha=16)


def test_xlabs_flux_is_what_diffusers_makes_of_it(tmp_path):
    tensors = {}
    for name, out, inputs in (
        ("double_blocks.0.processor.qkv_lora1", 9216, 3072),
        ("double_blocks.0.processor.qkv_lora2", 9216, 3072),
        ("double_blocks.18.processor.proj_lora1", 3072, 3072),
        ("double_blocks.18.processor.proj_lora2", 3072, 3072),
        ("single_blocks.37.processor.qkv_lora", 9216, 3072),
        ("single_blocks.37.processor.proj_lora", 3072, 15360),
    ):
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = pair(inputs, out)
    for front in ("", "diffusion_model."):
        save_file({front + k: t for k, t in tensors.items()}, tmp_path / "x.safetensors")
        adapter = lk.Adapter.load(tmp_path / "x.safetensors")
        theirs = conversion._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
        assert {k.removesuffix(".lora_A.weight") for k in theirs if "lora_A" in k} == set(adapter.updates)
        for module, f in adapter.factors.items():
            assert torch.equal(f.A, theirs[f"{module}.lora_A.weight"])
            assert torch.equal(f.B, theirs[f"{module}.lora_B.weight"])
            assert f.scale == 1


def test_bfls_control_lora_is_what_diffusers_makes_of_it(tmp_path):
    """All of Flux' modules, their biases, and the norms that were trained whole."""
    from lorakit.formats import names

    listed = names.module_list("flux")
    tensors = {}
    for name, modules in listed["ldm"].items():
        out, inputs = sum(listed["modules"][m][0] for m in modules), listed["modules"][modules[0]][1]
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair(inputs, out, 2)
        tensors[f"{name}.lora_B.bias"] = torch.randn(out)
    for i in range(19):
        for side in ("img", "txt"):
            for which in ("query", "key"):
                tensors[f"double_blocks.{i}.{side}_attn.norm.{which}_norm.scale"] = torch.randn(128)
    for i in range(38):
        for which in ("query", "key"):
            tensors[f"single_blocks.{i}.norm.{which}_norm.scale"] = torch.randn(128)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    theirs = conversion._convert_bfl_flux_control_lora_to_diffusers(dict(tensors))
    assert {k.removesuffix(".lora_A.weight") for k in theirs if k.endswith("lora_A.weight")} == set(adapter.updates)
    for module, update in adapter.updates.items():
        if module == "transformer.norm_out.linear":  # diffusers swaps halves of A's rank too
            continue
        assert torch.equal(update.inner.A, theirs[f"{module}.lora_A.weight"])
        assert torch.equal(update.inner.B, theirs[f"{module}.lora_B.weight"])
        assert torch.equal(update.bias, theirs[f"{module}.lora_B.bias"])
    assert {k: t for k, t in theirs.items() if ".norm_" in k and "lora" not in k}.keys() == adapter.saved.keys()
    for name, tensor in adapter.saved.items():
        assert torch.equal(tensor, theirs[name])


PEFT_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("name", ["Copy of adapter_model.safetensors", "adapter_model (1).safetensors"])
def test_a_renamed_file_is_named_with_the_name_it_should_have(name, tmp_path):
    A, B = pair()
    save_file({f"base_model.model.{Q}.lora_A.weight": A, f"base_model.model.{Q}.lora_B.weight": B}, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(AdapterError) as caught:
            lk.Adapter.load(source)
        assert name in str(caught.value)
        assert "rename it" in str(caught.value)


def test_a_numbered_mlx_file_is_named(tmp_path):
    A, B = pair()
    for number in (100, 200):
        save_file(
            {f"{Q}.lora_a": A.T.contiguous(), f"{Q}.lora_b": B.T.contiguous()},
            tmp_path / f"0000{number}_adapters.safetensors",
        )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}})
    )
    with pytest.raises(
        AdapterError, match=r"(?s)adapters\.safetensors cannot be read.*there is 0000100_adapters.*0000200_a"
    ):
        lk.Adapter.load(tmp_path)
    assert lk.Adapter.load(tmp_path / "0000200_adapters.safetensors").factors[Q].scale == 2


@pytest.mark.parametrize(
    "module, family",
    [
        (Q, "Llama-like"),
        ("model.layers.3.mlp.down_proj", "Llama-like"),
        ("model.language_model.layers.0.self_attn.q_proj", "vision-language"),
        ("model.layers.0.mlp.experts.1.up_proj", "mixture-of-experts"),
        ("transformer.h.0.attn.c_attn", "GPT-2"),
        ("transformer.h.2.self_attention.query_key_value", "GPT-2"),
        ("gpt_neox.layers.0.attention.query_key_value", "GPT-NeoX"),
        ("bert.encoder.layer.0.attention.self.query", "BERT-like"),
        ("distilbert.transformer.layer.0.attention.q_lin", "DistilBERT"),
        ("encoder.block.0.layer.0.SelfAttention.q", "T5-like"),
        ("model.decoder.layers.0.encoder_attn.q_proj", "BART"),
        ("backbone.layers.0.mixer.in_proj", "Mamba"),
    ],
)
def test_keys_full_of_lora_a_name_the_family_that_they_look_like(module, family, tmp_path):
    A, B = pair()
    save_file(
        {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(AdapterError, match=rf"(?s)PEFT's LoRA of .*{family}.*adapter_config\.json"):
        lk.Adapter.load(tmp_path / "x.safetensors")


def test_diffusion_models_are_no_language_models():
    for module in (
        "layers.0.attention.to_q",
        "transformer_blocks.0.attn.to_q",
        "blocks.0.self_attn.q",
        "down_blocks.0.x",
    ):
        assert family_of([f"{module}.lora_A.weight"]) is None
