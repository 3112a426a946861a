"""Batch the updates of several adapters that train together with equally many rows each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.gain import excess
from .stacks import EXCESS

if TYPE_CHECKING:
    from ..layer import LoraLayer
    from ..updates.update import Pair


class Group(NamedTuple):
    """One update per group of rows: A [G, r, in], B [G, out, r] and gains h [G, out], see `ops.projections`. None if no
    adapter has one.
    """

    A: Tensor | None
    B: Tensor | None
    scale: float
    dropout: float
    h: Tensor | None = None


def group(layer: LoraLayer, x: Tensor) -> Group | None:
    """Batch the adapters' updates of this layer for training; None if they differ in more than rank and scale.

    x: the layer's input, [rows, ..., in].
    """
    routing = layer.lora_route
    assert routing is not None
    if not routing.groups or not routing.tokens(layer, x) or routing.unpaired(layer):
        return None
    modules = layer._modules
    children: list[Pair | None] = [modules[c].pair(layer) if c in modules else None for c, _ in routing.groups]
    weights = [w for _, w in routing.groups]
    pairs: list[Pair] = [f for f in children if f is not None]
    if not layer.training and not x.requires_grad and not any(f.A.requires_grad or f.B.requires_grad for f in pairs):
        return None  # without gradients, `routes._stacked` is faster
    if not pairs:
        return Group(None, None, 1.0, 0.0)
    first = pairs[0]
    dropouts = {f.dropout if layer.training else 0.0 for f in pairs}
    ranks = [f.B.shape[-1] for f in pairs]
    if (
        len(dropouts) > 1
        or any(f.B.dim() == 3 or f.A.dtype != first.A.dtype for f in pairs)
        or max(ranks) * len(children) > EXCESS * sum(ranks)
    ):
        return None
    scales = [0.0 if f is None else f.scale * w for f, w in zip(children, weights, strict=True)]
    A = torch.stack([_padded(None if f is None else f.A, first.A, 0, max(ranks)) for f in children])
    B = torch.stack([_padded(None if f is None else f.B, first.B, 1, max(ranks)) for f in children])
    if len(set(scales)) > 1:
        scales, B = [1.0], B * torch.tensor(scales, dtype=B.dtype, device=B.device).view(-1, 1, 1)
    return Group(A, B, scales[0], dropouts.pop(), _gains(children, weights))


def _gains(children: Sequence[Pair | None], weights: Sequence[float]) -> Tensor | None:
    """Return weight · (g - 1) of each adapter, zero for those without a gain: [G, out]; None if none has one."""
    gains = [None if f is None or f.gain is None else excess(f.gain, w) for f, w in zip(children, weights, strict=True)]
    first = next((h for h in gains if h is not None), None)
    if first is None:
        return None
    return torch.stack([torch.zeros_like(first) if h is None else h for h in gains])


def _padded(factor: Tensor | None, like: Tensor, axis: int, rank: int) -> Tensor:
    """Pad a factor with zeros to this rank on `axis`; None gives zeros of the shape of `like`."""
    if factor is None:
        return like.new_zeros([rank if i == axis else size for i, size in enumerate(like.shape)])
    missing = rank - factor.shape[axis]
    return F.pad(factor, (0, missing) if axis else (0, 0, 0, missing)) if missing else factor
