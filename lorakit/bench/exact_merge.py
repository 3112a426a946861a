"""Measure what an exact unmerge costs: bytes kept per merged weight, by precision and by ‖ΔW‖ / ‖W‖.

    python -m lorakit.bench.exact_merge

W is normal with standard deviation 0.02; ΔW = B A has rank 16 and is scaled to the given share of ‖W‖. Nothing is
timed: sizes do not depend on the machine. For comparison, the share of weights that PEFT's unmerge, (W + ΔW) − ΔW,
leaves changed.
"""

from __future__ import annotations

import torch

from ..ops.delta import delta_rows
from ..ops.exact import add_, adding, subtract_

SIZE, RANK = 2048, 16


def main() -> None:
    torch.manual_seed(0)
    print("precision  |ΔW|/|W|   bytes a weight   weights changed after subtracting")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for share in (0.001, 0.01, 0.1, 1.0):
            W = (torch.randn(SIZE, SIZE) * 0.02).to(dtype)
            A, B = torch.randn(RANK, SIZE), torch.randn(SIZE, RANK)
            scale = share * float(W.float().norm() / (B @ A).norm())

            def change(rows: slice, A=A, B=B, scale=scale) -> torch.Tensor:
                return delta_rows(A, B, scale, rows)

            merged = W.clone()
            undo = add_(merged, adding(change))
            delta = change(slice(None))
            subtracted = ((W.float() + delta).to(dtype).float() - delta).to(dtype)
            subtract_(merged, adding(change), undo, "the weight")
            assert torch.equal(merged, W)
            changed = 100 * float((subtracted != W).float().mean())
            print(f"{str(dtype)[6:]:<10} {share:>8g}   {undo.nbytes() / W.numel():>14.3f}   {changed:>32.1f} %")


if __name__ == "__main__":
    main()
