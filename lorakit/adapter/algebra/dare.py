"""DARE (Yu et al. 2024): drop each element of ΔW with probability 1 - density, divide the others by density.

The expected ΔW stays the same. dare_linear then adds them with their weights, dare_ties elects signs as TIES does. What
is dropped depends only on the seed, the module's name and the adapter's index.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .ties_merging import Majority, elect_and_merge


def drop(delta: Tensor, density: float, seed: int, module: str, index: int) -> Tensor:
    """Drop elements of ΔW at random, and divide the others by `density`. `index`: the adapter's, of those combined."""
    if density >= 1:
        return delta
    own = zlib.crc32(f"{seed}/{index}/{module}".encode())
    made = torch.Generator(device=delta.device).manual_seed(own)
    kept = torch.empty_like(delta).bernoulli_(density, generator=made)
    return delta * kept / density


def dare_linear(sparse: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ ΔWᵢ. `sparse`: results of `drop`."""
    return sum((w * d for w, d in zip(weights, sparse, strict=True)), torch.zeros(()))


def dare_ties(sparse: Sequence[Tensor], weights: Sequence[float], majority: Majority = "total") -> Tensor:
    """Elect signs and merge, as TIES does. `sparse`: results of `drop`."""
    return elect_and_merge(sparse, weights, majority)
