"""Time plain against fused attention in a training step of short rows on a CPU; `PLAIN_ATTENTION` was chosen by this.

    python -m lorakit.bench.short_attention [--rounds 5]

The embedded model with a rank-16 adapter, bf16 if the CPU has it; forward and backward of about 1,536 tokens in rows of
the given length. Interleaved in one process, medians of CPU time.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import lorakit as lk

from ..bases.device import choose_dtype
from ..bases.load import EMBEDDED, load_model
from ..layers.fused import attention
from ..tasks.text.causal_loss import summed_loss

TOKENS = 1536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    device = torch.device("cpu")
    model = load_model(EMBEDDED, choose_dtype("auto", device).value, device)
    lk.attach(model, lk.LoraConfig(rank=16))
    attention.leave(model)  # otherwise lorakit's own backward would replace that of "sdpa" in 16 bits
    print("row length   plain / fused")
    for length in (32, 64, 128, 256, 512):
        ids = torch.randint(2, 4000, (TOKENS // length, length))
        labels = ids.clone()
        labels[:, : length // 2] = -100
        times: dict[str, list[float]] = {"eager": [], "sdpa": []}
        for turn in range(rounds + 1):
            for kind, seconds in times.items():
                model.set_attn_implementation(kind)
                began = time.process_time()
                summed_loss(model, {"input_ids": ids, "labels": labels}).backward()
                if turn:  # the first turn warms up
                    seconds.append(time.process_time() - began)
        print(f"{length:>10}   {median(times['eager']) / median(times['sdpa']):>13.2f}")


if __name__ == "__main__":
    main()
