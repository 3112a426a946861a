"""Time merging an adapter into a checkpoint: lorakit's streaming merge against PEFT's merge_and_unload and save.

A random bf16 checkpoint of Llama's shape (1.5 GB, in shards) and a rank-16 PEFT adapter of all its linears are written
to a temporary folder. The sides take turns merging it in fresh processes; the table shows medians. Wall time is that of
the process, imports included; lorakit's also includes fsync and reading the result back, which PEFT does not do. Peak
memory is the kernel's high-water mark. It includes pages of mapped files, so the part not backed by files (sampled
every 20 ms) is shown too.

    python -m lorakit.bench.merge_checkpoint --rounds 3
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HIDDEN, FFN, VOCAB, HEADS, RANK = 2048, 5632, 32000, 16, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every tensor."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(layers):
        for name, shape in LINEAR.items():
            yield f"model.layers.{i}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def make_base(folder: Path, layers: int, per_shard: int = 400_000_000) -> int:
    """Write the checkpoint tensor by tensor, at most `per_shard` bytes a shard. Return its size in bytes."""
    import torch
    from transformers import LlamaConfig

    from ..io.stream import StreamWriter

    shards: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    for name, shape in shapes(layers):
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and sum(entry[2] for entry in shards[-1].values()) + size > per_shard:
            shards.append({})
        shards[-1][name] = ("BF16", shape, size)
    weight_map = {}
    for i, layout in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        with StreamWriter(folder / file, layout, {"format": "pt"}) as out:
            for name, (_, shape, _) in layout.items():
                is_norm = len(shape) == 1
                out.write((torch.ones(shape) if is_norm else torch.randn(shape).mul_(0.02)).bfloat16())
                weight_map[name] = file
    total = sum(entry[2] for layout in shards for entry in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return total


def make_adapter(folder: Path, layers: int) -> None:
    """Write an adapter with random factors."""
    import torch

    import lorakit as lk

    targets = sorted(name.rsplit(".", 1)[-1] for name in LINEAR)
    factors = {}
    for i in range(layers):
        for name, (size_out, size_in) in LINEAR.items():
            A, B = torch.randn(RANK, size_in) * 0.02, torch.randn(size_out, RANK) * 0.02
            factors[f"model.layers.{i}.{name}"] = lk.Factors(A, B, 2.0 * RANK)
    lk.Adapter(lk.LoraConfig(rank=RANK, alpha=2 * RANK, targets=targets, task="CAUSAL_LM"), factors).save(folder)


def merge_with_lorakit(base: str, adapter: str, out: str) -> None:
    """Merge the files `base` and `adapter` into `out`, tensor by tensor."""
    from ..checkpoint import merge_checkpoint

    merge_checkpoint(base, adapter, out)


def merge_with_peft(base: str, adapter: str, out: str) -> None:
    """Load the model, merge the adapter, and save it to `out`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


SIDES = {"lorakit": merge_with_lorakit, "PEFT": merge_with_peft}


def anonymous_bytes(pid: int) -> int:
    """Return a process's resident bytes that are not backed by files, 0 if they are not known."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(side: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Merge in a fresh process. Return seconds, peak resident bytes, and the most bytes not backed by files."""
    command = [
        sys.executable,
        "-m",
        "lorakit.bench.merge_checkpoint",
        "--child",
        side,
        str(base),
        str(adapter),
        str(out),
    ]
    began, anonymous = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(child.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        stdout, stderr = child.communicate()
    if child.returncode:
        raise SystemExit(f"{side} failed:\n{stderr}")
    return {"seconds": seconds, "peak": float(stdout.split()[-1]), "anonymous": float(anonymous)}


def largest_difference(a: Path, b: Path) -> float:
    """Return the largest difference of two results in the first layer and the last norm, to check that they agree."""
    from safetensors import safe_open

    def read(folder: Path, name: str):
        index = folder / "model.safetensors.index.json"
        file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
        with safe_open(folder / file, framework="pt") as opened:
            return opened.get_tensor(name).float()

    names = [f"model.layers.0.{name}.weight" for name in LINEAR] + ["model.norm.weight"]
    return max((read(a, name) - read(b, name)).abs().max().item() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--layers", type=int, default=12, help="number of layers, 103 MB each; the embeddings take 262 MB"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to create the temporary folder (needs space for three checkpoints)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, *paths = options.child
        from ..bases.device import peak_memory

        SIDES[side](*paths)
        print(peak_memory())
        return

    import peft
    import torch

    with tempfile.TemporaryDirectory(prefix="merge-checkpoint-", dir=options.folder) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        required = 3 * 2 * sum(torch.Size(shape).numel() for _, shape in shapes(options.layers))
        if free < required * 1.1:
            raise SystemExit(
                f"{folder} has {free / 1e9:.1f} GB free; this needs {required / 1e9:.1f} GB\n"
                "  give another --folder, or fewer --layers"
            )
        (folder / "base").mkdir()
        size = make_base(folder / "base", options.layers)
        make_adapter(folder / "adapter", options.layers)
        runs_by_side: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                shutil.rmtree(folder / side, ignore_errors=True)
                runs_by_side[side].append(measure(side, folder / "base", folder / "adapter", folder / side))
        difference = largest_difference(folder / "lorakit", folder / "PEFT")

    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for side, runs in runs_by_side.items()
    }
    result = {
        "checkpoint": size,
        "rounds": options.rounds,
        "runs": runs_by_side,
        "medians": medians,
        "largest_difference": difference,
        "time_ratio": medians["lorakit"]["seconds"] / medians["PEFT"]["seconds"],
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()},
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"bf16, {size / 1e9:.2f} GB, rank {RANK} on {len(LINEAR) * options.layers} linears, {options.rounds} rounds, "
        f"{result['threads']} threads, torch {torch.__version__}"
    )
    names = {"lorakit": "lorakit", "PEFT": f"PEFT {peft.__version__}"}
    print(f"{'':<12}{'seconds':>10}{'peak, MB':>12}{'/ checkpoint':>14}{'not file-backed':>18}")
    for side, m in medians.items():
        print(
            f"{names[side]:<12}{m['seconds']:>10.1f}{m['peak'] / 1e6:>12,.0f}{m['peak'] / size:>14.2f}"
            f"{m['anonymous'] / 1e6:>15,.0f} MB"
        )
    print(f"time: lorakit / PEFT = {result['time_ratio']:.2f}; largest difference of the results {difference:.2g}")


if __name__ == "__main__":
    main()
