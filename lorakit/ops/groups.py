"""Low-rank products for one adapter, or for several that train together, each with an equal group of rows.

    x: [N, in]   A: [r, in]      B: [out, r]         one adapter
    x: [N, in]   A: [G, r, in]   B: [G, out, r]      G adapters; rows 0 .. N/G - 1 are the first one's, and so on

One batched product replaces a product per adapter. Forward and backward of 8 adapters of rank 16 in a 512 -> 1408
linear, 64 tokens each, on one Zen 4 core: bf16 1.0 ms against 2.3 one by one, float32 1.9 against 1.8; at width 256
bf16 0.4 against 1.5, float32 0.4 against 0.6.
"""

from __future__ import annotations

import torch
from torch import Tensor


def groups(x: Tensor, like: Tensor) -> Tensor:
    """Return x [N, size] as [G, N / G, size] if `like` has groups, [G, ...]."""
    return x if like.dim() == 2 else x.reshape(like.shape[0], -1, x.shape[1])


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale · a b, of two matrices or of each group's.

    The GEMM scales by itself: another operation would cost as much as a thin product.
    """
    unused = a.new_empty(())  # beta = 0: not read
    multiply = torch.addmm if a.dim() == 2 else torch.baddbmm
    return multiply(unused, a, b, beta=0, alpha=scale)


def add_product(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add scale · a b, of two matrices or of each group's, to y in place. y: [N, size], contiguous."""
    if a.dim() == 2:
        y.addmm_(a, b, alpha=scale)
    else:
        y.view(a.shape[0], -1, y.shape[1]).baddbmm_(a, b, alpha=scale)


def gradient_of_B(down: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gᵀ down, [out, r]. down: [N, r], g: [N, out]."""
    # As (downᵀ g)ᵀ: with the long side last, the product takes 0.9 of the time in bf16 and half in float32 (1,024 x
    # 512, rank 16).
    return (down.mT @ groups(g, down)).mT.to(dtype, memory_format=torch.contiguous_format)
