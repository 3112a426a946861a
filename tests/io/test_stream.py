"""Streamed safetensors files agree with the safetensors library, and broken files are explained."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import LorakitError
from lorakit.io import stream
from lorakit.io.stream import StreamWriter, read_header

TENSORS = {
    "wide": torch.randn(5, 7, dtype=torch.float64),
    "weight": torch.randn(33, 9, 2),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "ids": torch.arange(6),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([True, False, True]),
}


def layout(tensors):
    return {n: (stream.NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}


def test_the_library_reads_files_written_in_blocks(tmp_path, monkeypatch):
    with StreamWriter(tmp_path / "a.safetensors", layout(TENSORS), {"format": "pt", "ä": "ö"}) as out:
        for tensor in TENSORS.values():
            for block in tensor.split(2) if tensor.dim() else [tensor]:
                out.write(block)
    written = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(written[n], t) and written[n].dtype == t.dtype for n, t in TENSORS.items())
    assert read_header(tmp_path / "a.safetensors")[1] == {"format": "pt", "ä": "ö"}


def test_files_written_by_the_library_are_read_in_blocks_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 40)
    monkeypatch.setattr(stream, "COPY_BYTES", 13)
    save_file(TENSORS, tmp_path / "a.safetensors")
    slots, _ = read_header(tmp_path / "a.safetensors")
    assert slots.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        blocks = [block for _, block in slots[name].rows()]
        assert torch.equal(torch.cat(blocks).reshape(tensor.shape) if blocks else tensor, tensor)
        copied = b"".join(bytes(block.numpy()) for block in slots[name].copied())
        assert copied == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    assert len(list(slots["weight"].rows())) > 1


def test_writing_less_or_more_than_the_layout_says_fails(tmp_path):
    with pytest.raises(AssertionError, match="not written"), StreamWriter(tmp_path / "a", layout(TENSORS)):
        pass
    with (
        pytest.raises(AssertionError, match="more was written"),
        StreamWriter(tmp_path / "b", {"a": ("F32", (1,), 4)}) as out,
    ):
        out.write(torch.zeros(2))


def header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data,match",
    [
        (b"abc", "3 bytes"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header would have"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "'a' is malformed"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + b"1234", "'a' would end at byte"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "'a' would end"),
        (header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8), r"not \[3\] of F32"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(data, match, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(data)
    with pytest.raises(LorakitError, match=rf"broken.safetensors is not a sound(.|\n)*{match}"):
        read_header(tmp_path / "broken.safetensors")


def test_a_file_truncated_while_being_read_is_an_error(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    slots, _ = read_header(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-4])
    with pytest.raises(LorakitError, match="4 bytes early"):
        list(slots["a"].copied())
