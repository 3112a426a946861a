"""Singular vectors of a base's weight: the first, to the accuracy of float32, and the last."""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapter.algebra.svd import Svd, full_svd, matrix_svd

# The randomized SVD iterates until a pass gains less than this share. 1e-9 gives the first vectors of a flat spectrum
# about as exactly as the full SVD in float32.
ACCURACY = 1e-9


def first(W: Tensor, rank: int) -> Svd:
    """Return the `rank` largest singular values of W."""
    return matrix_svd(W, rank, accuracy=ACCURACY)


def last(W: Tensor, rank: int) -> Svd:
    """Return the `rank` smallest singular values of W, descending."""
    svd = full_svd(W)
    return Svd(svd.U[:, -rank:], svd.S[-rank:], svd.Vt[-rank:], svd.total)


def halves(svd: Svd, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B with scale · B A = U S Vᵀ, each with √S."""
    root = (svd.S / scale).sqrt()
    return root[:, None] * svd.Vt, svd.U * root


def is_finite(*tensors: Tensor) -> bool:
    """Whether all elements are finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
