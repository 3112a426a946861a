"""Writes are atomic and reproducible, and a failed one says why."""

from __future__ import annotations

import errno
import json
import os
import resource
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import WriteError
from lorakit.io.atomic import replacing, write_text
from lorakit.io.tensors import write_tensors


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with suppress(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_equal_tensors_make_equal_files(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.bfloat16), "ü": torch.ones(1).expand(4)}
    metadata = {"format": "pt", "lorakit": json.dumps({"text": 'ü "quoted" \\ \n'}), "another": "x"}
    contents = set()
    for i in range(6):
        write_tensors(tmp_path / f"{i}.safetensors", dict(sorted(tensors.items(), reverse=i % 2 == 0)), metadata)
        contents.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(contents) == 1
    assert {n: t.tolist() for n, t in load_file(tmp_path / "0.safetensors").items()} == {
        n: t.tolist() for n, t in tensors.items()
    }
    from safetensors import safe_open

    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "x.txt", "a")
    finally:
        os.umask(old)
    assert (tmp_path / "x.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("format", ["peft", "loralib", "kohya", "diffusers", "gguf"])
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path, format):
    name = (
        "model.layers.0.self_attn.q_proj"
        if format == "gguf"
        else "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    width = 64 if format == "gguf" else 1280
    factors = lk.Factors(torch.randn(2, width), torch.randn(width, 2), 2.0)
    adapter = lk.Adapter(lk.LoraConfig(rank=2, alpha=2, targets=["q"]), {name: factors})
    options = {"base": {"model_type": "llama", "num_attention_heads": 4}} if format == "gguf" else {}
    suffix = {"gguf": ".gguf", "loralib": ".pt", "peft": ""}.get(format, ".safetensors")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        WriteError,
        match=rf"cannot write {tmp_path}/file/a.*: {tmp_path}/file is a file, not a folder\n  give another path",
    ):
        adapter.save(tmp_path / "file" / f"a{suffix}", format, **options)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(WriteError, match="is not a regular file"):
        write_text(pipe, "text")
    assert pipe.is_fifo()


def test_a_folder_in_the_way_of_a_file_is_named(tmp_path):
    (tmp_path / "page.html").mkdir()
    for write in (lambda p: write_text(p, "x"), lambda p: write_tensors(p, {"a": torch.zeros(2)})):
        with pytest.raises(WriteError, match=r"page\.html: a folder has that name\n  give another name"):
            write(tmp_path / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(WriteError, match="the name is too long"):
        write_text(tmp_path / ("x" * 250), "x")


@pytest.mark.parametrize("code", ["EACCES", "ENOSPC", "EROFS"])
def test_permission_space_and_read_only_errors_are_explained(tmp_path, monkeypatch, code):
    expected = {
        "EACCES": "no permission to write in",
        "ENOSPC": "no space left on the disk",
        "EROFS": "read-only file system",
    }[code]

    def refuse(*args, **kwargs):
        raise OSError(getattr(errno, code), "raw words", str(tmp_path))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/a.txt: .*{expected}") as caught:
        write_text(tmp_path / "a.txt", "x")
    assert "raw words" not in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_full_disk_is_explained_whichever_library_writes(tmp_path):
    """A limit on file size stands in for a full disk: both fail in the same system call."""
    tensors = {"a": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    messages = []
    try:
        for write in (
            lambda p: write_text(p, "x" * 100_000),
            lambda p: write_tensors(p, tensors),
            lambda p: lk.Adapter(lk.LoraConfig(), {"q": lk.Factors(torch.ones(2, 50_000), torch.ones(3, 2), 1.0)}).save(
                p, "loralib"
            ),
        ):
            try:
                write(tmp_path / "out.pt")
            except WriteError as error:
                messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(messages) == 3, messages
    assert all(f"cannot write {tmp_path}/out.pt: " in message for message in messages)
    assert not list(tmp_path.iterdir())
