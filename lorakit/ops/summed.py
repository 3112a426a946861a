"""A small frozen weight together with its update, as one weight (Hu et al. 2021, section 4.1).

    W + s · B A        W: [out, in] or [out, in, *kernel]   A: [r, in, *kernel]   B: [out, r, 1...]   s = alpha / r
    (1 + h) ∘ W + s · B A                                                         with a gain (see `gain`)

A layer with this weight computes what the base and the update compute apart, in one large product instead of three of
which two are thin. It has more to multiply: backward makes the gradient of the whole weight, from which A and B get
theirs. For a small weight that costs less than the calls it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gain import times_gain

# In elements of W. Forward and backward of a linear, over the time with thin products (float32, one Zen 4 core):
# 64 x 64 0.65 (rank 8, 64 rows) to 0.79 (rank 4, 1,024 rows); 96 x 96 0.71 (rank 8, 64 rows); 128 x 128 0.92 and 192 x
# 192 1.04 (rank 16, 256 rows). 3x3 convolutions of 8x8 pixels, rank 8: 32 x 32 0.78, 64 x 64 0.93 to 0.96, 96 x 96
# 1.11.
LARGEST = 96 * 96
# The sum's elements over those of the thin product that would be kept for backward. With 1, the embedded UNet's passes
# (48 x 48 weights, 256 rows) take 1.04 times as long.
LARGEST_KEPT = 2


def summed_weight(
    x: Tensor, features: int, W: Tensor, A: Tensor, B: Tensor, scale: float, h: Tensor | None = None
) -> Tensor | None:
    """Return W + s · B A, differentiable in A and B; None where thin products take less time or memory.

    x: the layer's input; `features`: how many of its elements are one row (a token, a pixel); h [out]: W counts 1 + h
    times.
    """
    if (
        W.numel() > LARGEST
        # Autograd keeps the sum for backward, instead of the thin product [rows, r].
        or W.numel() * features > LARGEST_KEPT * x.numel() * A.shape[0]
        # In 16 bits a small update would be rounded away.
        or W.dtype not in (torch.float32, torch.float64)
        or not (x.dtype == W.dtype == A.dtype == B.dtype)
        or A.shape[1:] != W.shape[1:]
    ):
        return None
    return reference(W if h is None else times_gain(W, h.view(-1, *(1 for _ in W.shape[1:]))), A, B, scale)


def reference(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return W + s · B A, in W's shape and memory layout."""
    if W.dim() == 2:
        return torch.addmm(W, B, A, alpha=scale)
    if W.is_contiguous():
        return torch.addmm(W.flatten(1), B.flatten(1), A.flatten(1), alpha=scale).view(W.shape)
    return torch.add(W, (B.flatten(1) @ A.flatten(1)).view(W.shape), alpha=scale)
