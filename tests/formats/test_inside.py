"""What a folder means where an adapter is asked for, and what is said of files and folders that are models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.formats import find, format_of

LDM = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2),
    "first_stage_model.a.weight": torch.zeros(2, 2),
}
LLAMA = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2), "model.norm.weight": torch.zeros(2)}


@pytest.fixture
def adapter():
    factors = {"layers.0.q": lk.Factors(torch.randn(2, 6), torch.randn(6, 2), 2.0)}
    return lk.Adapter(lk.LoraConfig(rank=2, alpha=2, targets=["q"]), factors)


def folder(path, *files):
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors"])
def test_the_one_adapter_file_of_a_folder_is_read(adapter, tmp_path, name):
    adapter.save(folder(tmp_path / "one", "README.md", "notes.json") / name, "loralib")
    save_file({"weights": torch.zeros(3)}, tmp_path / "one" / "other.safetensors")
    assert find(tmp_path / "one") == tmp_path / "one" / name
    assert format_of(tmp_path / "one") == "loralib"
    assert lk.Adapter.load(tmp_path / "one", alpha=2).rank == 2


def test_several_adapters_in_a_folder_are_named(adapter, tmp_path):
    many = folder(tmp_path / "many")
    adapter.save(many / "a.pt", "loralib")
    adapter.save(many / "b.safetensors", "loralib")
    adapter.save(many / "c")
    with pytest.raises(
        AdapterError, match=r"(?s)many holds 3 adapters: c, a\.pt, b\.safetensors\n.*for example .*many/c"
    ):
        lk.Adapter.load(many)


def test_a_runs_folder_is_its_adapter(adapter, tmp_path):
    run = folder(tmp_path / "run", "config.yaml")
    (run / "checkpoints").mkdir()
    with pytest.raises(AdapterError, match="a run that has not finished"):
        lk.Adapter.load(run)
    adapter.save(run / "adapter")
    adapter.save(run / "another")
    assert find(run) == run / "adapter"
    assert lk.Adapter.load(run).rank == 2


def test_a_run_on_pictures_is_its_adapter_or_newest_checkpoint(tmp_path):
    run = folder(tmp_path / "run", "config.yaml")
    for step in (5, 20):
        folder(run / "checkpoints" / f"step-{step}", "pytorch_lora_weights.safetensors")
    assert find(run) == run / "checkpoints" / "step-20"
    folder(run / "adapter", "pytorch_lora_weights.safetensors")
    assert find(run) == run / "adapter"


def test_a_cloneofsimo_file_and_those_beside_it_are_one_adapter(tmp_path):
    pairs = [t for _ in range(48) for t in (torch.randn(8, 2), torch.randn(2, 8))]
    home = folder(tmp_path / "pt")
    torch.save(pairs, home / "lora.text_encoder.pt")
    assert find(home) == home / "lora.text_encoder.pt"
    torch.save(pairs, home / "lora.pt")
    assert find(home) == home / "lora.pt"


@pytest.mark.parametrize("adapters", [0, 1])
def test_a_model_folder_is_called_a_model(adapter, tmp_path, adapters):
    model = folder(tmp_path / "model", "config.json")
    save_file(LLAMA, model / "model.safetensors")
    told = "lorakit extract BASE"
    if adapters:
        adapter.save(model / "lora")
        told = "there is one inside it: .*lora"
    with pytest.raises(AdapterError, match=rf"(?s)model is a model \(config\.json\), not an adapter.*{told}"):
        lk.Adapter.load(model)
    with pytest.raises(AdapterError, match=r"(?s)holds a model's weights.*lorakit inspect .*model --modules"):
        lk.Adapter.load(model / "model.safetensors")
    with pytest.raises(AdapterError, match="is a diffusion pipeline"):
        lk.Adapter.load(folder(tmp_path / "pipeline", "model_index.json"))


def test_a_config_beside_a_lora_makes_no_model_of_it(adapter, tmp_path):
    adapter.save(folder(tmp_path / "lora", "config.json") / "style.safetensors", "loralib")
    assert find(tmp_path / "lora") == tmp_path / "lora" / "style.safetensors"


def test_a_model_file_is_called_a_model(tmp_path):
    save_file(LDM, tmp_path / "ldm.safetensors")
    torch.save(LLAMA, tmp_path / "pytorch_model.bin")
    with pytest.raises(AdapterError, match="is a diffusion model"):
        lk.Adapter.load(tmp_path / "ldm.safetensors")
    with pytest.raises(AdapterError, match="holds a model's weights"):
        lk.Adapter.load(tmp_path / "pytorch_model.bin")


def test_pefts_weights_without_their_config_ask_for_it(adapter, tmp_path):
    home = adapter.save(tmp_path / "peft")
    (home / "adapter_config.json").unlink()
    for path in (home, home / "adapter_model.safetensors"):
        with pytest.raises(AdapterError, match=r"without (its|their) adapter_config\.json"):
            lk.Adapter.load(path)


def test_an_empty_folder_and_one_of_other_things_say_so(tmp_path):
    with pytest.raises(AdapterError, match="it is empty"):
        lk.Adapter.load(folder(tmp_path / "empty"))
    with pytest.raises(AdapterError, match=r"no adapter_config\.json.*it holds a\.txt"):
        lk.Adapter.load(folder(tmp_path / "other", "a.txt"))
    mlx = folder(tmp_path / "mlx")
    (mlx / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora"}))
    with pytest.raises(AdapterError, match=r"adapters\.safetensors cannot be read"):
        lk.Adapter.load(mlx)
