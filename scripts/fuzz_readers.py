"""Damaged files through every reader: each must give something sound or a LorakitError, in bounded memory, and nothing
else.

Adapters in each format, and checkpoints that are merged into: a language model's folder, a diffusion model's single
file.

    python scripts/fuzz_readers.py --count 2000 [--seed 0]

prints how many inputs of each format were tried, how many were refused and how many were still sound.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "formats"))

import torch
from damaged import damage, sound
from safetensors.torch import save_file

import lorakit as lk
from lorakit.checkpoint.parts import open_parts
from lorakit.checkpoint.single_file import module_rows
from lorakit.errors import LorakitError

MEMORY = 3 << 30  # bytes of address space beyond what is there at the start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000, help="inputs of each format")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    failed = total = 0
    with tempfile.TemporaryDirectory() as name:
        files = sound(Path(name)) | bases(Path(name))
        for path in files.values():
            read(path, Path(name))  # what is loaded once is loaded now
        limit_memory()
        for format, path in files.items():
            refused, bad = fuzz(path, Path(name), random.Random(f"{asked.seed} {format}"), asked.count)
            total, failed = total + asked.count, failed + bad
            print(
                f"{format:<12} {asked.count:>7,} inputs   {refused:>7,} refused   {asked.count - refused - bad:>7,} "
                f"still sound   {bad} failures"
            )
    print(f"{total:,} inputs in all, {failed} failures")
    sys.exit(1 if failed else 0)


def fuzz(path: Path, folder: Path, rng: random.Random, count: int) -> tuple[int, int]:
    """(refused, failures)"""
    good, refused, bad = path.read_bytes(), 0, 0
    for _ in range(count):
        path.write_bytes(damage(good, rng))
        try:
            read(path, folder)
        except LorakitError:
            refused += 1
        except Exception:
            bad += 1
            traceback.print_exc(limit=-3)
    path.write_bytes(good)
    return refused, bad


def bases(folder: Path) -> dict[str, Path]:
    """A checkpoint's folder and a single file, with a few tensors of theirs."""
    names = (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_mod.lin",
        "txt_in",
        "single_blocks.0.linear1",
        "final_layer.linear",
    )
    save_file({f"{name}.weight": torch.ones(84, 4) for name in names}, folder / "base_file.safetensors")
    model = folder / "base_model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "plain"}')
    save_file(
        {f"layers.{i}.proj.weight": torch.ones(8, 4) for i in range(5)}, model / "model.safetensors", {"format": "pt"}
    )
    return {"base folder": model / "model.safetensors", "base file": folder / "base_file.safetensors"}


def read(path: Path, folder: Path) -> None:
    """Load it, and look at all that it holds."""
    if path.name in ("base_file.safetensors", "model.safetensors"):
        (part,) = open_parts(path if path.name == "base_file.safetensors" else path.parent, ())
        if part.base.single_file:
            module_rows(part.base.single_file, part.base.shapes)
        for slot in part.base.tensors.values():
            for _ in slot.copied():
                pass
        return
    where = path.parent if path.suffix == ".json" else path
    options = {"alpha": 2.0} if path.suffix == ".pt" else {"base": folder / "base"} if path.suffix == ".gguf" else {}
    for update in lk.Adapter.load(where, **options).updates.values():
        update.delta()


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
