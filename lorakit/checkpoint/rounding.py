"""Which part of a change found in a 16-bit checkpoint is what storing it in 16 bits made.

A merge in bfloat16 rounds each weight to a multiple of its unit in the last place u, which adds an error of variance
u² / 12. A matrix of independent errors with variances σ² has no singular value above about

    max over rows of √(Σ σ²)  +  max over columns of √(Σ σ²)           (Bandeira and van Handel 2016, theorem 1.1)

which for equal variances is σ (√m + √n), where the spectrum of noise ends (Marchenko and Pastur 1967). So what of ΔW's
spectrum lies below that edge cannot be told from rounding, however many ranks it takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..io.stream import Slot

# Bits of the mantissa, and the exponent of the smallest normal number: below it the unit stays the same.
STORED = {"BF16": (7, -126), "F16": (10, -14)}
# The largest singular value of what rounding made lay at 0.62 to 1.00 of the edge (Gaussian weights, 64 x 64 to
# 2048 x 512, bfloat16 and float16, changes of a tenth to many units), the smallest of the change itself above 1.5.
MARGIN = 1.1


def noise_edge(stored: Slot) -> float | None:
    """Return the largest singular value that rounding to a tensor's own precision makes of ΔW; None above 16 bits."""
    if stored.dtype not in STORED or len(stored.shape) < 2:
        return None
    if not math.prod(stored.shape):
        return 0.0
    widest_row, columns = 0.0, torch.zeros(math.prod(stored.shape[1:]), dtype=torch.float64)
    for _, block in stored.rows():
        variances = _units(block, *STORED[stored.dtype]).flatten(1).double().square() / 12
        widest_row = max(widest_row, float(variances.sum(1).max()))
        columns += variances.sum(0)
    return MARGIN * (math.sqrt(widest_row) + math.sqrt(float(columns.max())))


def _units(values: Tensor, bits: int, smallest: int) -> Tensor:
    """The unit in the last place of each value."""
    exponent = torch.frexp(values.float().abs()).exponent - 1  # |value| in [2^exponent, 2^(exponent + 1))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp_min(smallest) - bits)
