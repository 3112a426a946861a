"""TIES merging (Yadav et al. 2023, algorithm 1) and magnitude pruning, on ΔW.

    trim       of each ΔW keep the share `density` with the largest magnitudes, the rest becomes 0
    elect      for each number, the sign with the larger total magnitude (or, "frequency", the one that more of them
               have)
    merge      the mean of the numbers that have that sign, each times its adapter's weight

magnitude_prune is the trimming alone, and the weighted sum. With weights below 0 the signs are elected as they would be
added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Majority = Literal["total", "frequency"]


def trim(delta: Tensor, density: float) -> Tensor:
    """The share `density` of its numbers with the largest magnitudes (and those equal to the last of them); zero
    elsewhere.
    """
    keep = int(density * delta.numel())
    if keep >= delta.numel():
        return delta
    if keep == 0:
        return torch.zeros_like(delta)
    size = delta.abs()
    # Selecting one number is several times faster than sorting them (topk).
    least = size.flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(size >= least, delta, 0.0)


def magnitude_prune(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Σ wᵢ trim(ΔWᵢ)."""
    return sum((w * trim(d, density) for w, d in zip(weights, deltas, strict=True)), torch.zeros(()))


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float, majority: Majority = "total") -> Tensor:
    return elect_and_merge([trim(d, density) for d in deltas], weights, majority)


def elect_and_merge(deltas: Sequence[Tensor], weights: Sequence[float], majority: Majority = "total") -> Tensor:
    """The last two steps, of deltas that are sparse already. A tie goes to the positive sign, and a zero has none."""
    signed = [d * math.copysign(1.0, w) for w, d in zip(weights, deltas, strict=True)]
    votes = sum((s if majority == "total" else s.sign() for s in signed), torch.zeros(()))
    positive = votes >= 0
    merged, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for w, s in zip(weights, signed, strict=True):
        agrees = torch.where(positive, s > 0, s < 0)
        merged += torch.where(agrees, abs(w) * s, 0.0)
        count += agrees
    return merged / count.clamp_(min=1)
