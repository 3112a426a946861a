"""A git-lfs pointer, a web page or a server's answer in a file's place is named as that, wherever files are read."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

import lorakit as lk
from lorakit.checkpoint.base import open_base
from lorakit.data.read import read_rows
from lorakit.errors import DataError, LorakitError, not_the_file

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345678\n"
)
STAND_INS = {
    "git-lfs pointer": POINTER,
    r"web page \(HTML\)": "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    "web page": "\n\n<html lang='en'>",
    "an XML page": '<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>',
    "Entry not found": "Entry not found",
    "git-annex": "/annex/objects/SHA256E-s12--abc.safetensors\n",
}


@pytest.mark.parametrize("said", STAND_INS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.gguf", "adapters.npz"])
def test_a_single_file(tmp_path, said, name):
    (tmp_path / name).write_text(STAND_INS[said])
    with pytest.raises(LorakitError, match=said) as caught:
        lk.Adapter.load(tmp_path / name)
    assert "\n  " in str(caught.value)  # with the fix
    with pytest.raises(LorakitError, match=said):
        lk.Adapter.load(tmp_path)


def test_the_pointer_says_how_large_the_file_is_and_how_to_get_it(tmp_path):
    (tmp_path / "x.safetensors").write_text(POINTER)
    with pytest.raises(LorakitError, match=r"(?s)12,345,678 bytes.*git lfs pull"):
        lk.Adapter.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "lorakit.json"])
def test_pefts_folder(tmp_path, file):
    model = lk.attach(tiny.llama(), lk.LoraConfig(rank=2, targets=["q_proj"]))
    lk.capture(model).save(tmp_path)
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(LorakitError, match=rf"{file} is a git-lfs pointer"):
        lk.Adapter.load(tmp_path)


def test_mlx_and_diffusers_folders(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": 20.0}}))
    (tmp_path / "adapters.safetensors").write_text(POINTER)
    with pytest.raises(LorakitError, match="git-lfs pointer"):
        lk.Adapter.load(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "pytorch_lora_weights.safetensors").write_text(POINTER)
    with pytest.raises(LorakitError, match="git-lfs pointer"):
        lk.Adapter.load(other)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_base(tmp_path, file):
    from lorakit.bases.load import load_model, load_tokenizer

    tiny.llama().save_pretrained(tmp_path)
    (tmp_path / file).write_text(POINTER)

    def load():
        if file == "tokenizer.json":
            return load_tokenizer(str(tmp_path))
        return load_model(str(tmp_path), torch.float32, torch.device("cpu"))

    with pytest.raises(LorakitError, match=rf"{file} is a git-lfs pointer"):
        load()
    if file != "tokenizer.json":
        with pytest.raises(LorakitError, match=rf"{file} is a git-lfs pointer"):
            open_base(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_rows(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(DataError, match="git-lfs pointer"):
        read_rows(tmp_path / name)


def test_real_files_are_none_of_these(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.txt").write_text("version of a story that I heard")
    assert [not_the_file(path) for path in sorted(tmp_path.iterdir())] == [None] * 4
    assert not_the_file(tmp_path / "absent") is None
