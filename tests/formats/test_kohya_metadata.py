"""A kohya file's metadata: what other programs tell the model by, and the hashes that link a file to its page."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors
from lorakit.config import LoraConfig
from lorakit.formats import kohya
from lorakit.formats.kohya_metadata import stated_model
from lorakit.io.tensors import read_tensors

CONFIG = LoraConfig(rank=4, alpha=4, targets=["to_q"])
LINEAR = [
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
]
CONV = "unet.mid_block.resnets.0.conv1"


def linear(rank: int, alpha: float, width: int = 8) -> Factors:
    return Factors(torch.randn(rank, width), torch.randn(width, rank), alpha)


def conv(rank: int, alpha: float) -> Factors:
    return Factors(torch.randn(rank, 8, 3, 3), torch.randn(8, rank, 1, 1), alpha, "conv")


def written(adapter: Adapter, path, **options) -> dict[str, str]:
    kohya.write(adapter, path, **options)
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def made(updates, model="sd1", **metadata) -> Adapter:
    return Adapter(CONFIG, updates, metadata={"model": model} | metadata)


@pytest.mark.parametrize("width", [8, 4096])
def test_the_hashes_are_those_of_the_files_own_bytes(width, tmp_path):
    path = tmp_path / "a.safetensors"
    header = written(made({LINEAR[0]: linear(64, 1.0, width)}, header={"ss_tag_frequency": "x" * 1000}), path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert header["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert header["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert (header["sshs_legacy_hash"] == "e3b0c442") == (len(data) <= 1 << 20)


def test_the_hashes_hold_even_where_the_metadata_is_longer_than_a_megabyte(tmp_path):
    path = tmp_path / "a.safetensors"
    header = written(made({LINEAR[0]: linear(4, 1.0)}, header={"ss_tag_frequency": 'é"' * 900_000}), path)
    data = path.read_bytes()
    assert header["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert header["ss_tag_frequency"] == 'é"' * 900_000


def test_the_hash_is_of_the_numbers_alone_and_equal_adapters_are_equal_files(tmp_path):
    adapter = made({LINEAR[0]: linear(4, 1.0)})
    first = written(adapter, tmp_path / "a.safetensors")
    other = written(made(adapter.factors, header={"ss_training_comment": "another"}), tmp_path / "b.safetensors")
    assert first["sshs_model_hash"] == other["sshs_model_hash"]
    data = (tmp_path / "a.safetensors").read_bytes()
    written(adapter, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == data
    changed = written(made({LINEAR[0]: linear(4, 1.0)}), tmp_path / "c.safetensors")
    assert changed["sshs_model_hash"] != first["sshs_model_hash"]


def test_one_rank_and_alpha_are_named_and_mixed_ones_are_dynamic(tmp_path):
    path = tmp_path / "a.safetensors"
    two = made({LINEAR[0]: linear(4, 2.0), LINEAR[1]: linear(4, 2.0), CONV: conv(2, 1.0)})
    header = written(two, path, bake_alpha=False)
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_network_module"]) == (
        "4",
        "2.0",
        "networks.lora",
    )
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1.0"}
    mixed = made({LINEAR[0]: linear(4, 2.0), LINEAR[1]: linear(3, 1.0), CONV: conv(2, 1.0)})
    header = written(mixed, path, bake_alpha=False)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    header = written(made({LINEAR[0]: linear(4, 2.0), LINEAR[1]: linear(4, 1.0)}), path, bake_alpha=True)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")
    header = written(two, path)  # alphas that differ go into the factors, and the metadata says what the file has
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}


def test_lycoris_updates_are_announced_as_such(tmp_path):
    update = Lokr(1.0, w1=torch.ones(2, 2), w2=torch.ones(4, 4))
    header = written(made({LINEAR[0]: update}), tmp_path / "a.safetensors")
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"])["algo"] == "lokr"


@pytest.mark.parametrize(
    "model, module, version, v2, architecture, network",
    [
        ("sd1", LINEAR[0], "sd_v1", "False", "stable-diffusion-v1/lora", "networks.lora"),
        ("sd2", LINEAR[0], "sd_v2", "True", "stable-diffusion-v2-512/lora", "networks.lora"),
        ("sdxl", LINEAR[0], "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "networks.lora"),
        ("sd3", "transformer.proj_out", "sd3", "False", "stable-diffusion-3-m/lora", "networks.lora_sd3"),
        ("flux", "transformer.x_embedder", "flux1", "False", "flux-1-dev/lora", "networks.lora_flux"),
    ],
)
def test_the_base_is_named_so_that_programs_know_it(model, module, version, v2, architecture, network, tmp_path):
    header = written(made({module: linear(4, 2.0)}, model), tmp_path / "my_style.safetensors")
    assert header["ss_base_model_version"] == version
    assert header["ss_v2"] == v2
    assert header["modelspec.architecture"] == architecture
    assert header["ss_network_module"] == network
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.title"] == "my_style"
    assert stated_model(header) == model
    assert stated_model({k: v for k, v in header.items() if k.startswith("modelspec.")}) == model


def test_what_a_file_said_of_its_training_stays_and_what_is_no_longer_true_goes(tmp_path):
    header = {
        "ss_tag_frequency": '{"a": {"b": 1}}',
        "ss_output_name": "style",
        "ss_network_dim": "128",
        "ss_network_args": '{"conv_dim": "64"}',
        "sshs_model_hash": "f" * 64,
        "sshs_legacy_hash": "f" * 8,
        "modelspec.hash_sha256": "0x0",
        "modelspec.author": "me",
        "ss_base_model_version": "sd_v1",
        "note": "kept",
    }
    path = tmp_path / "a.safetensors"
    found = written(made({LINEAR[0]: linear(4, 2.0)}, header=header), path)
    kept = ("ss_tag_frequency", "ss_output_name", "modelspec.author", "note")
    assert {k: found[k] for k in kept} == {k: header[k] for k in kept}
    assert (found["ss_network_dim"], found["ss_network_args"], found["modelspec.title"]) == ("4", "{}", "style")
    assert found["sshs_model_hash"] != "f" * 64
    assert "modelspec.hash_sha256" not in found
    again = kohya.read(path, *read_tensors(path))
    assert again.metadata["header"]["ss_tag_frequency"] == header["ss_tag_frequency"]


def test_the_words_of_another_base_or_another_format_are_not_repeated(tmp_path):
    header = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    found = written(made({LINEAR[0]: linear(4, 2.0)}, header=header), tmp_path / "a.safetensors")
    assert (found["ss_base_model_version"], found["modelspec.architecture"]) == ("sd_v1", "stable-diffusion-v1/lora")
    found = written(
        made({LINEAR[0]: linear(4, 2.0)}, header={"lora_adapter_metadata": "{}"}), tmp_path / "a.safetensors"
    )
    assert "lora_adapter_metadata" not in found
