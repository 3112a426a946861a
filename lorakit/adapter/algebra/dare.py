"""DARE (Yu et al. 2024): each number of ΔW is dropped with probability 1 - density, the others are divided by density.

The expected ΔW stays the same. dare_linear then adds them with their weights, dare_ties elects signs as TIES does. What
is dropped depends on the seed, the module's name and the adapter's place in the list, and on nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .ties_merging import Majority, elect_and_merge


def drop(delta: Tensor, density: float, seed: int, module: str, place: int) -> Tensor:
    """Drop and rescale."""
    if density >= 1:
        return delta
    own = zlib.crc32(f"{seed}/{place}/{module}".encode())
    made = torch.Generator(device=delta.device).manual_seed(own)
    kept = torch.empty_like(delta).bernoulli_(density, generator=made)
    return delta * kept / density


def dare_linear(sparse: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ drop(ΔWᵢ), of deltas that `drop` gave."""
    return sum((w * d for w, d in zip(weights, sparse, strict=True)), torch.zeros(()))


def dare_ties(sparse: Sequence[Tensor], weights: Sequence[float], majority: Majority = "total") -> Tensor:
    """TIES' election of signs, of deltas that `drop` gave."""
    return elect_and_merge(sparse, weights, majority)
