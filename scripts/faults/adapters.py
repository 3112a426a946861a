"""Adapters of the embedded model: sound ones, and folders that look like adapters and are not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path


def make(folder: Path, names: list[str]) -> None:
    """Write an adapter of random factors under each name."""
    import torch

    import lorakit as lk

    model = lk.load_base("embedded", dtype="fp32", device="cpu")
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        lk.attach(model, lk.LoraConfig(rank=8, alpha=16, targets="all-linear"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        lk.capture(model).save(folder / name)
        lk.detach(model)


def break_copies(sound: Path, root: Path) -> list[str]:
    """Write broken copies of an adapter below `root`. Return their names."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = "adapter_model.safetensors"
    made: list[str] = []

    def copy(name: str) -> Path:
        made.append(name)
        shutil.copytree(sound, root / name)
        return root / name

    def tensors(name: str, change) -> None:
        path = copy(name) / weights
        values = load_file(path)
        save_file(change(values), path, metadata={"format": "pt"})

    def overwrite(name: str, data: bytes, file: str = weights) -> None:
        (copy(name) / file).write_bytes(data)

    whole = (sound / weights).read_bytes()
    overwrite("truncated", whole[: len(whole) // 2])
    overwrite("empty", b"")
    overwrite("header-huge", (1 << 62).to_bytes(8, "little") + whole[8:])
    overwrite("header-beyond", len(whole).to_bytes(8, "little") + whole[8:])
    overwrite("noise", os.urandom(4096))
    overwrite("lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    overwrite("config-broken", b"{", "adapter_config.json")
    overwrite("config-deep", b"[" * 100_000 + b"]" * 100_000, "adapter_config.json")
    overwrite("config-list", b"[1, 2]", "adapter_config.json")
    overwrite("record-broken", b'{"data": ', "lorakit.json")
    tensors("not-a-number", lambda v: {n: torch.full_like(t, float("nan")) for n, t in v.items()})
    tensors("infinite", lambda v: {n: torch.full_like(t, float("inf")) for n, t in v.items()})
    tensors("wrong-shape", lambda v: {n: t[..., :-1].contiguous() for n, t in v.items()})
    tensors("other-names", lambda v: {n.replace("model.layers", "model.blocks"): t for n, t in v.items()})
    tensors("half", lambda v: dict(list(v.items())[::2]))
    folder = copy("pickled")
    (folder / weights).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": os.getcwd}))
    folder = copy("fifo")
    (folder / weights).unlink()
    os.mkfifo(folder / weights)
    folder = copy("link-out")
    (folder / weights).unlink()
    (folder / weights).symlink_to("/etc/passwd")
    folder = copy("device")
    (folder / weights).unlink()
    (folder / weights).symlink_to("/dev/zero")
    folder = copy("no-weights")
    (folder / weights).unlink()
    (root / "loop").symlink_to(root / "loop")
    (root / "bare").mkdir()
    return [*made, "loop", "bare"]


PLACES = (
    "/etc", "/etc/passwd", "../../etc", "..", ".", "", "a/../../etc", "~root", "sound\x00", "x" * 5000, "hf://a/b",
    "someone/adapter", "file:///etc/passwd", "http://127.0.0.1/a", "\\\\host\\share", "sound/../..", "/proc/self/fd/0",
)  # fmt: skip


def template_bombs(sound: Path, root: Path) -> list[str]:
    """Write adapters whose own chat template takes for ever, fills memory or reaches for the machine."""
    bombs = {
        "template-time": "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}x",
        "template-size": "{{ 'x' * 10**10 }}",
        "template-power": "{{ (9**9**9)|string }}",
        "template-reach": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "template-deep": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    }
    for name, text in bombs.items():
        shutil.copytree(sound, root / name)
        record = root / name / "lorakit.json"
        about = json.loads(record.read_text()) if record.exists() else {}
        about["data"] = {"template": "chat", "chat_template": text}
        record.write_text(json.dumps(about))
    return list(bombs)
