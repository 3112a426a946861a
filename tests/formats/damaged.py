"""Sound files of every format, and damaged copies of them: for the tests of bad input and `scripts/fuzz_readers.py`."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch

import lorakit as lk
from lorakit import formats

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn."
LANGUAGE = "model.layers.0.self_attn."
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 8,
}


def made(*names: str, width: int = 8, rank: int = 2) -> lk.Adapter:
    torch.manual_seed(0)
    factors = {name: lk.Factors(torch.randn(rank, width), torch.randn(width, rank), float(rank)) for name in names}
    return lk.Adapter(
        lk.LoraConfig(rank=rank, alpha=rank, targets=sorted({n.rsplit(".", 1)[-1] for n in names})), factors
    )


def sound(folder: Path) -> dict[str, Path]:
    """A sound adapter in each format: the file that is damaged, by the format's name."""
    language = made(LANGUAGE + "q_proj", LANGUAGE + "v_proj")
    image = made(UNET + "to_q", UNET + "to_k", width=320)
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA))
    language.save(folder / "peft", "peft")
    language.save(folder / "lora.pt", "loralib")
    language.save(folder / "mlx", "mlx")
    formats.save(language, folder / "lora.gguf", "gguf", base=base)
    image.save(folder / "kohya.safetensors", "kohya")
    image.save(folder / "diffusers.safetensors", "diffusers")
    return {
        "peft": folder / "peft" / "adapter_model.safetensors",
        "peft config": folder / "peft" / "adapter_config.json",
        "loralib": folder / "lora.pt",
        "mlx": folder / "mlx" / "adapters.safetensors",
        "mlx config": folder / "mlx" / "adapter_config.json",
        "gguf": folder / "lora.gguf",
        "kohya": folder / "kohya.safetensors",
        "diffusers": folder / "diffusers.safetensors",
    }


def damage(data: bytes, rng: random.Random) -> bytes:
    """One way or another a file may be broken, or made to break its reader."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [truncated, flipped, overwritten, doubled]
    if data[8:9] == b"{":
        ways += [header_length, header_value, header_value, header_value, header_name]
    elif data[:1] == b"{":
        ways += [json_value, json_value, json_value]
    return rng.choice(ways)(data, rng)


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32))):
        changed[rng.randrange(min(len(data), rng.choice((16, 256, 1 << 30))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice((1, 8, 64))
    filling = rng.choice((b"\0", b"\xff", b"\x7f", b"9")) * size
    return data[:start] + filling + data[start + size :]


def doubled(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + 64] + data[start:]


def header_length(data: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice((0, 1, 7, len(data), 10**8, 1 << 40, (1 << 64) - 1))) + data[8:]


def header_value(data: bytes, rng: random.Random) -> bytes:
    """A claim of another shape, dtype or place, with a header that is still sound JSON."""
    header, rest = _header(data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    slot = header[name]
    field = rng.choice(("dtype", "shape", "shape", "data_offsets", "gone", "metadata"))
    if field == "dtype":
        slot["dtype"] = rng.choice(("F64", "F16", "I8", "BOOL", "F4", "X", 7))
    elif field == "shape":
        slot["shape"] = rng.choice(([], [0], [-1, 8], [1 << 40, 1 << 40], [8, 2], [2, 2, 4], [10**9], ["8"], None))
    elif field == "data_offsets":
        slot["data_offsets"] = rng.choice(([0, 0], [0, 1 << 60], [-8, 8], [64, 0], [0], None))
    elif field == "gone":
        del header[name]
    else:
        header["__metadata__"] = rng.choice(
            ({"lorakit": "{"}, {"lorakit": "[]"}, {"lora_adapter_metadata": '{"unet.r": -1}'}, {"x": 1}, [])
        )
    return _with_header(header, rest)


def header_name(data: bytes, rng: random.Random) -> bytes:
    header, rest = _header(data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    other = rng.choice(
        (
            "",
            "x" * 10_000,
            name + ".",
            "../" + name,
            name.replace("lora_", "lora_lora_"),
            name.replace("A", "B").replace("down", "up"),
            "\0",
            name.replace("unet", "xnet"),
            name.replace("0", "99999999999"),
            name.replace("a", "b", 1),
        )
    )
    header[other] = header.pop(name)
    return _with_header(header, rest)


def json_value(data: bytes, rng: random.Random) -> bytes:
    values = json.loads(data)
    place = values
    key = rng.choice(list(place))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place))
    place[key] = rng.choice(
        (None, -1, 0, 1e308, float("nan"), "x", "(" * 50, [], {}, [[]], {"(a+)+$": 3}, True, 1 << 70, "../../etc")
    )
    return json.dumps(values).encode()


def _header(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _with_header(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest
