"""Singular vectors of a weight, a gradient or an error: the first, and the last."""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapter.algebra.svd import OVERSAMPLE, Svd, full_svd, random_svd

# Up to this size of the smaller side the first vectors are LAPACK's (float32, one EPYC core: 0.4 s for 1,024 x 1,024,
# 2.6 s for 2,048 x 2,048, eight times as long for twice the size). Beyond, subspace iteration with twice the columns:
# of Gaussian noise, which has no decay, it finds 99 % of the energy of the best 16, of a decaying spectrum nearly all.
# (PEFT's `pissa_niter_N` is the same with N passes; its `pissa` takes LAPACK's at any size.)
EXACT_UP_TO = 2048


def first(W: Tensor, rank: int) -> Svd:
    """Return the `rank` largest singular values of W."""
    if min(W.shape) <= EXACT_UP_TO:
        return full_svd(W).cut(rank)
    return random_svd(W, rank, accuracy=0.0, oversample=max(OVERSAMPLE, rank))


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
