"""Time a frozen output layer's loss in chunks (`ops/fused/cross_entropy.py`) against all logits at once, by chunk size.

    python -m lorakit.bench.output_loss [--rows 512] [--turns 9]

Forward and backward, relative to the two matrix products alone (hidden states to logits, and back). Interleaved,
medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.fused import cross_entropy
from .measure import in_turn

SIZES = ((8192, 256), (8192, 512), (8192, 1024), (32000, 512), (4096, 288))  # vocabulary, width
CHUNKS = (64, 128, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{args.rows} rows, over the products alone     all at once   " + "   ".join(f"chunks of {n}" for n in CHUNKS)
    )
    for vocabulary, width in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            h = torch.randn(args.rows, width, device=device).to(dtype)
            W = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
            times = in_turn(sides(h, W, torch.randint(0, vocabulary, (args.rows,), device=device)), args.turns)
            ratios = [times[name] / times["products"] for name in ("all at once", *map(str, CHUNKS))]
            print(f"{vocabulary:>6} x {width:<5} {dtype!s:<15}" + "".join(f"{ratio:>14.2f}" for ratio in ratios))


def sides(h: Tensor, W: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed. h: [rows, width]. W: [vocabulary, width]. targets: [rows]."""

    def step(loss: Callable[..., Tensor]) -> None:
        leaf = h.detach().requires_grad_()
        loss(leaf, W, None, targets).sum().backward()

    def chunked(rows: int) -> None:
        cross_entropy.ROWS, cross_entropy.BYTES = rows, 0
        step(cross_entropy.linear_cross_entropy)

    return {
        "products": lambda: F.linear(h, W) @ W,
        "all at once": lambda: step(cross_entropy.reference),
        **{str(rows): partial(chunked, rows) for rows in CHUNKS},
    }


if __name__ == "__main__":
    main()
