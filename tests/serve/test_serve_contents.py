"""Broken, huge and hostile adapter files are refused by name, without a path of the server and without a crash."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from random import Random

import numpy as np
import pytest
import served_adapters
import torch
from read_adapters import PICKLES, config, read, refused
from safetensors.torch import load_file, save_file

from lorakit.errors import AdapterError, WriteError
from lorakit.serve.guard.adapter_files import HTTP, LOCAL


def test_pickles_are_refused_unless_the_command_line_allows_them(folder):
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    assert "pickle" in refused(folder)
    assert "--allow-pickle" not in refused(folder)
    assert "--allow-pickle" in refused(folder, LOCAL)
    assert read(folder, PICKLES).adapter.updates
    shutil.move(folder / "adapter_model.bin", weights)  # a suffix is no content
    assert "first bytes" in refused(folder)


def test_a_pickle_is_not_executed_even_if_allowed(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    refused(folder)
    refused(folder, PICKLES)
    assert not (tmp_path / "executed").exists()


def test_numpy_archives_are_for_the_command_line(tmp_path):
    folder = tmp_path / "sql"
    served_adapters.value().save(folder, format="mlx")
    tensors = load_file(folder / "adapters.safetensors")
    np.savez(folder / "adapters.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    (folder / "adapters.safetensors").unlink()
    assert "archive" in refused(folder)
    assert read(folder, LOCAL).adapter.updates
    torch.save(tensors, folder / "adapters.npz")
    assert "first bytes" in refused(folder, LOCAL)


@pytest.mark.parametrize("at", [0, 7, 8, 100, -1])
def test_cut_weights_are_refused(folder, at):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:at])
    said = refused(folder)
    if at == 100:
        assert "is cut short" in said


def test_huge_headers_are_refused_before_they_are_parsed(folder):
    weights = folder / "adapter_model.safetensors"
    length = HTTP.header + 8
    weights.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * (length - 1) + bytes(64))
    assert "header has" in refused(folder)
    weights.write_bytes((1 << 60).to_bytes(8, "little") + b"{" + bytes(64))
    refused(folder)


def test_gguf_that_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "sql.gguf"
    for tensors, pairs in [(1 << 40, 1), (1, 1 << 40), (100_000, 1)]:
        path.write_bytes(
            b"GGUF" + (3).to_bytes(4, "little") + tensors.to_bytes(8, "little") + pairs.to_bytes(8, "little")
        )
        assert "claims" in refused(path)
    path.write_bytes(b"GGUF\x03")
    refused(path)


def test_nan_and_infinity_are_refused(folder):
    for bad in (float("nan"), float("inf")):
        made = served_adapters.value()
        update = next(iter(made.updates.values()))
        update.A[0, 0] = bad
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in tensors if "lora_A" in name)
        save_file({**tensors, name: update.A}, folder / "adapter_model.safetensors")
        assert "not finite" in refused(folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "lorakit.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "nul",
        '{"a": ' + "[" * 50 + "]" * 50 + "}",
        '{"a": ' * 100_000,
        '{"r": ' + "9" * 5_000 + "}",
        " " * (HTTP.json + 1),
        '{"data": {"template": "chat", "chat_template": 7}, "r": "x"}',
        "\x00" * 100,
    ],
)
def test_json_that_is_broken_deep_or_large_is_refused_or_left_out(folder, file, text):
    (folder / file).write_text(text)
    if file == "lorakit.json" and text.startswith('{"data"'):  # a record that is not as we write it counts as none
        assert "chat_template" in read(folder).adapter.metadata["data"]
    else:
        refused(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": -1},
        {"r": 10**12},
        {"r": []},
        {"lora_alpha": [1]},
        {"peft_type": "NO_SUCH"},
        {"peft_type": None},
        {"rank_pattern": 7},
        {"rank_pattern": {"(": 2}},
        {"target_modules": 7},
        {"rank_pattern": {"(a+)+": "x"}},
    ],
)
def test_configs_that_make_no_sense_are_refused(folder, changes):
    config(folder, **changes)
    assert refused(folder)


def test_patterns_that_would_not_end_are_refused_in_time(folder, monkeypatch):
    monkeypatch.setattr("lorakit.serve.guard.patterns.SECONDS", 0.5)
    config(folder, rank_pattern={"(([a-z._0-9]+)+)+!": 8})
    begin = time.monotonic()
    assert "regular expressions" in refused(folder)
    assert time.monotonic() - begin < 20


def test_ordinary_patterns_are_read(folder):
    config(folder, rank_pattern={r"layers\.(0|1)\..*q_proj": 2}, target_modules=r".*\.(q_proj|k_proj)")
    assert read(folder).adapter.updates


def test_templates_are_kept_as_text(folder):
    text = "{{ ''.__class__.__mro__ }}{% for a in range(10**9) %}{% endfor %}"
    served_adapters.write(folder, data={"template": "chat", "chat_template": text})
    assert read(folder).adapter.metadata["data"]["chat_template"] == text


def test_placeholders_say_what_they_are(folder):
    (folder / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
    )
    assert "git-lfs" in refused(folder)


def test_a_full_disk_is_said(folder, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorakit.serve.sources._write", full)
    with pytest.raises(WriteError, match=r"no space(.|\n)*TMPDIR"):
        read(folder)


def test_more_than_an_adapter_may_have_is_refused_before_it_is_read(folder):
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.truncate(HTTP.total + 1)  # a hole; no disk is used
    assert "bytes" in refused(folder)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_read_or_refused(folder, seed, caplog):
    """Any bytes: no other error than AdapterError, and none that no reader foresees (those are logged)."""
    random = Random(seed)
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(60):
        name = random.choice(sorted(original))
        content = bytearray(original[name])
        for _ in range(random.choice([1, 1, 4])):
            content[random.randrange(min(random.choice([16, 300, 1 << 20]), len(content)))] = random.randrange(256)
        if random.random() < 0.2:
            del content[random.randrange(len(content)) :]
        (folder / name).write_bytes(content)
        with contextlib.suppress(AdapterError):
            read(folder)
        (folder / name).write_bytes(original[name])
    assert not [record for record in caplog.records if record.exc_info]


def test_errors_are_text_that_can_be_sent(folder):
    config(folder, r="\ud800", peft_type="\ud800")  # half of a surrogate pair, which UTF-8 cannot hold
    refused(folder).encode("utf8")
    (folder / os.fsdecode(b"\xff.safetensors")).touch()
    (folder / "adapter_config.json").unlink()
    (folder / "two.safetensors").touch()
    refused(folder).encode("utf8")
    assert len(refused(folder)) <= 2_100
