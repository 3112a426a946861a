"""Packed projections and grouped convolutions as plain factors of a larger rank, as PEFT's files hold them."""

from __future__ import annotations

import math

from torch import Tensor

from ..adapter.lora import Factors
from ..ops.packed import ungroup


def plain_pair(f: Factors) -> tuple[Tensor, Tensor, float]:
    """(A, B, alpha) with the same ΔW as plain factors, without packed parts or shared groups."""
    if f.parts:
        return f.A, f.B, f.alpha * growth(sum(f.parts), f.rslora)
    if f.groups > 1 and f.A.shape[0] == f.B.shape[1]:
        return ungroup(f.A, f.groups), f.B, f.alpha * growth(f.groups, f.rslora)
    return f.A, f.B, f.alpha


def growth(blocks: int, rslora: bool) -> float:
    """The factor for alpha that keeps the scale when the rank grows `blocks` times."""
    return math.sqrt(blocks) if rslora else blocks
