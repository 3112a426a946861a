"""What an exact unmerge costs: bytes kept for each merged weight, by precision and by how large ΔW is beside W.

    python -m lorakit.bench.exact_merge

W is normal with deviation 0.02, ΔW is B A of rank 16 scaled to the given share of W's norm. Not timed: sizes do not depend on
the machine. Beside it, PEFT's way back, (W + ΔW) − ΔW, and the share of weights that it leaves changed.
"""

from __future__ import annotations

import torch

from ..ops.delta import delta_rows
from ..ops.exact import add_, subtract_

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
            undo = add_(merged, change)
            every = change(slice(None))
            plain = ((W.float() + every).to(dtype).float() - every).to(dtype)
            subtract_(merged, change, undo, "the weight")
            assert torch.equal(merged, W)
            drift = 100 * float((plain != W).float().mean())
            print(f"{str(dtype)[6:]:<10} {share:>8g}   {undo.nbytes() / W.numel():>14.3f}   {drift:>32.1f} %")


if __name__ == "__main__":
    main()
