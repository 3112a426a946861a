"""TIES merging (Yadav et al. 2023, algorithm 1) and magnitude pruning, on ΔW.

    trim       keep the share `density` of each ΔW with the largest magnitudes, set the rest to 0
    elect      for each element, the sign with the larger total magnitude ("frequency": the more frequent sign)
    merge      the mean of the elements that have that sign, each times its adapter's weight

magnitude_prune is trimming alone, then the weighted sum. A negative weight flips the signs before the election.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Majority = Literal["total", "frequency"]


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the elements with the largest magnitudes (and ties with the last of them); zeros
    elsewhere.
    """
    keep = int(density * delta.numel())
    if keep >= delta.numel():
        return delta
    if keep == 0:
        return torch.zeros_like(delta)
    size = delta.abs()
    # Selecting one element is several times as fast as sorting them (topk).
    least = size.flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(size >= least, delta, 0.0)


def magnitude_prune(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return Σ wᵢ trim(ΔWᵢ). `deltas`: of equal shapes; `density`: the share of elements to keep, 0 to 1."""
    return sum((w * trim(d, density) for w, d in zip(weights, deltas, strict=True)), torch.zeros(()))


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float, majority: Majority = "total") -> Tensor:
    """Trim, elect and merge. `deltas`: of equal shapes; `density`: the share of elements to keep, 0 to 1."""
    return elect_and_merge([trim(d, density) for d in deltas], weights, majority)


def elect_and_merge(deltas: Sequence[Tensor], weights: Sequence[float], majority: Majority = "total") -> Tensor:
    """Elect signs and merge deltas that are sparse already. A tie goes to the positive sign; zeros do not vote."""
    signed = [d * math.copysign(1.0, w) for w, d in zip(weights, deltas, strict=True)]
    votes = sum((s if majority == "total" else s.sign() for s in signed), torch.zeros(()))
    positive = votes >= 0
    merged, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for w, s in zip(weights, signed, strict=True):
        agrees = torch.where(positive, s > 0, s < 0)
        merged += torch.where(agrees, abs(w) * s, 0.0)
        count += agrees
    return merged / count.clamp_(min=1)
