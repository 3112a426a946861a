"""Time operations on adapter files, for an 8B-shaped Llama (rank 16 on all linears: 224 modules, 41.9 M parameters).

    python -m lorakit.bench.adapter_files [--rounds 3]

The adapter has random bf16 factors and is written as a PEFT folder. `resize` is compared with what it replaces, an SVD
of the full ΔW (float32, LAPACK), on one module of each shape, in this process.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from functools import partial
from pathlib import Path

import torch

import lorakit as lk

from ..adapter.algebra.combine import combined
from ..adapter.algebra.resize import resize
from ..analysis.inspect import describe_adapter
from ..formats.convert import convert
from .measure import in_turn

HIDDEN, MLP, KV, LAYERS, RANK = 4096, 14336, 1024, 32, 16
SHAPES = {  # [out, in] of Llama 3.1 8B
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
BASE = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
}


def make(seed: int) -> lk.Adapter:
    """Return an adapter with random factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(LAYERS):
        for name, (out, inner) in SHAPES.items():
            A, B = (
                torch.randn(shape, generator=generator).mul_(0.01).bfloat16() for shape in ((RANK, inner), (out, RANK))
            )
            factors[f"model.layers.{layer}.{name}"] = lk.Factors(A, B, 32.0)
    endings = [name.rpartition(".")[2] for name in SHAPES]
    return lk.Adapter(lk.LoraConfig(rank=RANK, alpha=32, targets=endings), factors)


def full_svd(f: lk.Factors, rank: int) -> None:
    """Resize one module by an SVD of its full ΔW."""
    U, S, Vt = torch.linalg.svd(f.matrix(), full_matrices=False)
    (U[:, :rank] * S[:rank]).contiguous(), Vt[:rank].contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        paths = [make(seed).save(Path(folder) / str(seed)) for seed in (0, 1)]
        a, b = (lk.Adapter.load(path) for path in paths)
        print(f"{len(a.factors)} modules, {a.parameters / 1e6:.1f} M parameters, bf16")
        runs = {
            "load": lambda: lk.Adapter.load(paths[0]),
            "load and inspect": lambda: json.dumps(
                describe_adapter(lk.Adapter.load(paths[0]), str(paths[0])).to_dict()
            ),
            "combine two, exact": lambda: combined([a, b], [0.7, 0.3]),
            "combine two, then rank 16": lambda: combined([a, b], [0.7, 0.3], rank=16),
            "resize to rank 8": lambda: resize(a, 8),
            "resize to 90 % of all energy": lambda: resize(a, keep=0.9, overall=True),
            "save": lambda: a.save(Path(folder) / "out"),
            "convert to gguf": lambda: convert(lk.Adapter.load(paths[0]), Path(folder) / "out.gguf", "gguf", base=BASE),
            "convert to mlx": lambda: convert(lk.Adapter.load(paths[0]), Path(folder) / "mlx", "mlx"),
        }
        for what, run in runs.items():
            print(f"{what:<30} {in_turn({what: run}, rounds, warm=0)[what]:7.2f} s")
    print(f"\n{'one module, to rank 8':<30}  resize   full SVD   ratio")
    for name in ("self_attn.k_proj", "self_attn.q_proj", "mlp.down_proj"):
        f = a.factors[f"model.layers.0.{name}"]
        one = lk.Adapter(lk.LoraConfig(rank=RANK, targets=["m"]), {"m": f})
        ours = in_turn({"": partial(resize, one, 8)}, 5 * rounds, warm=0)[""]
        theirs = in_turn({"": partial(full_svd, f, 8)}, 1, warm=0)[""]
        out, inner = SHAPES[name]
        print(f"{name:<18} {out:>5} x {inner:<5} {ours:7.4f} s {theirs:8.2f} s {theirs / ours:7.0f}")


if __name__ == "__main__":
    main()
