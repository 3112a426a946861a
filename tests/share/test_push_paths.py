"""Local paths in an uploaded adapter: cut where that is safe, reported where not."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_adapter import adapter, same

import lorakit as lk
from lorakit import formats
from lorakit.share.push import push
from lorakit.share.upload import without_local_paths


def test_local_paths_are_not_uploaded(hub, tmp_path):
    value = adapter(
        "/home/alice/models/llama",
        recipe={"model": "/home/alice/models/llama", "validation": "~/alice/rows.jsonl"},
        note="1/2",
    )
    folder = value.save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    # full of what looks like a path, and is none
    config["target_modules"] = r"(?:.*\.)?\d+\.mlp\.q_proj|.*\.layers\.\d+\.q_proj"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = push(folder, "someone/lora")
    assert any(
        "adapter_config.json, base_model_name_or_path: a local path is cut to 'llama'" in line for line in done.mended
    )
    assert not any(b"alice" in body for _, body in hub.bodies)
    found = lk.Adapter.load("someone/lora")
    assert same(found, value)
    assert found.config.base == "llama"
    assert found.config.targets == config["target_modules"]
    assert found.metadata == {"recipe": {"model": "llama", "validation": "rows.jsonl"}, "note": "1/2"}
    assert json.loads((folder / "adapter_config.json").read_text()) == config, "what is here stays"
    push(folder, "someone/lora", base_model="meta/llama")
    assert lk.Adapter.load("someone/lora").config.base == "meta/llama"


@pytest.mark.parametrize(
    "base, uploaded",
    [
        ("../private/acme-secret-llama", "acme-secret-llama"),
        ("./llama", "llama"),
        ("clients/acme/llama", "llama"),
        ("clients/llama/", "llama"),  # a folder that is here
        ("models/llama", "llama"),  # nobody's on the hub
        ("..\\acme\\llama", "llama"),
        ("/home/alice/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0ab12", "Qwen/Qwen3-0.6B"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("https://example.org/a/b/llama", "https://example.org/a/b/llama"),
        ("..", ".."),
    ],
)
def test_a_base_that_is_not_a_hub_id_is_uploaded_by_its_last_component(hub, tmp_path, monkeypatch, base, uploaded):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients" / "llama").mkdir(parents=True)
    folder = adapter(base, recipe={"model": base}).save(tmp_path / "adapter")
    done = push(folder, "someone/lora", card=False)
    there = hub.files("someone/lora")
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == uploaded
    assert json.loads(there["lorakit.json"])["recipe"] == {"model": uploaded}
    assert [line.split(":")[0] for line in done.mended] == (
        []
        if base == uploaded
        else [
            "adapter_config.json, base_model_name_or_path",
            "adapter_model.safetensors, lorakit, recipe, model",
            "lorakit.json, recipe, model",
        ]
    )
    assert done.left == []
    assert same(lk.Adapter.load("someone/lora"), lk.Adapter.load(folder))


def test_every_local_path_is_cut_or_reported(hub, tmp_path):
    notes = {
        "argv": ["train", "--data=/home/bob/rows.jsonl", "/home/bob/out", "--lr=1e-4"],
        "about": "trained on /home/alice/x, see https://example.org/a/b",
        "also": "rows of ../acme/rows.jsonl",
        "sizes": {"/home/carol/rows.jsonl": 3},
        "validation": "private/acme/rows.jsonl",
        "link": "https://example.org/c/d",
    }
    folder = adapter(recipe=notes).save(tmp_path / "adapter")
    dry = push(folder, "someone/lora", dry_run=True)
    done = push(folder, "someone/lora")
    recipe = json.loads(hub.files("someone/lora")["lorakit.json"])["recipe"]
    assert recipe == notes | {"argv": ["train", "--data=rows.jsonl", "out", "--lr=1e-4"], "validation": "rows.jsonl"}
    copies = ("adapter_model.safetensors, lorakit", "lorakit.json")
    assert sorted(done.mended) == [
        f"{copy}, recipe, {told}"
        for copy in copies
        for told in (
            "argv[1]: a local path is cut to '--data=rows.jsonl'",
            "argv[2]: a local path is cut to 'out'",
            "validation: a local path is cut to 'rows.jsonl'",
        )
    ]
    assert sorted(done.left) == [
        f"{copy}, recipe, {told}"
        for copy in copies
        for told in (
            "about: holds a local path",
            "also: holds a local path",
            "sizes, /home/carol/rows.jsonl: the key holds a local path",
        )
    ]
    assert (dry.mended, dry.left) == (done.mended, done.left)
    assert done.to_dict()["left"] == done.left


def test_the_tensor_files_header_is_cleaned_and_the_tensors_are_unchanged(hub, folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors,
        file,
        {"lorakit": json.dumps({"recipe": {"data": "/home/alice/rows"}}), "note": "from /home/alice/x", "format": "pt"},
    )
    done = push(folder, "someone/lora")
    assert done.mended == ["adapter_model.safetensors, lorakit, recipe, data: a local path is cut to 'rows'"]
    assert done.left == ["adapter_model.safetensors, note: holds a local path"]
    there = hub.files("someone/lora")[file.name]
    size = int.from_bytes(there[:8], "little")
    assert json.loads(there[8 : 8 + size])["__metadata__"] == {
        "lorakit": '{"recipe": {"data": "rows"}}',
        "note": "from /home/alice/x",
        "format": "pt",
    }
    assert same(lk.Adapter.load("someone/lora"), lk.Adapter.load(folder))
    old = file.read_bytes()
    assert there[8 + size :] == old[8 + int.from_bytes(old[:8], "little") :]


def test_a_single_files_paths_are_reported_not_cut(hub, tmp_path):
    file = formats.save(adapter(), tmp_path / "lora.safetensors", "loralib")
    save_file(
        load_file(file),
        file,
        {"base": "/home/alice/llama", "args": '["--data=/home/alice/x"]', "url": "https://example.org/a/b"},
    )
    done = push(file, "someone/lora", alpha=8.0)
    assert sorted(done.left) == [
        "lora.safetensors, args[0]: holds a local path",
        "lora.safetensors, base: holds a local path",
    ]
    assert done.mended == []
    assert hub.files("someone/lora")[file.name] == file.read_bytes()


def test_local_paths_in_gguf_metadata_are_reported(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "qwen2")
    writer.add_string("general.source.url", "https://example.org/a/b")
    writer.add_string("general.description", "from /home/alice/llama")
    writer.add_tensor("x", torch.ones(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = {"lora.gguf": tmp_path / "lora.gguf"}
    with ExitStack() as stack:
        found = without_local_paths(files, None, stack)
    assert (found.files, found.changed) == (files, [])
    assert found.left == ["lora.gguf, general.description: holds a local path"]
