"""Apply a Kronecker product to inputs without building it (LoKr; Yeh et al. 2024, section 4).

    y = s · (W1 ⊗ W2) x = s · vec(W1 X W2ᵀ)        X: x as [i1, i2]
                                                   W1: [o1, i1]   W2: [o2, i2], or W2a [o2, r] W2b [r, i2]

x: [..., i1·i2], y: [..., o1·o2]. With W2 = W2a W2b that is i1·i2·r + o1·i1·r + o1·o2·r multiplications per input, as
many as a LoRA's of rank r and a few more; the dense product has o1·o2·i1·i2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, first: Tensor, second: tuple[Tensor, ...], scale: float) -> Tensor:
    """Compute the equation. `second`: (W2,) or (W2a, W2b)."""
    W2 = second[0] if len(second) == 1 else second[0] @ second[1]
    return F.linear(x, torch.kron(first, W2) * scale)


def apply(x: Tensor, first: Tensor, second: tuple[Tensor, ...], scale: float) -> Tensor:
    """Compute `reference` from narrow products, in whichever order takes fewer multiplications."""
    (o1, i1), o2, i2 = first.shape, second[0].shape[0], second[-1].shape[1]
    first = first * scale  # the smallest of the tensors
    X = x.unflatten(-1, (i1, i2))
    if len(second) == 2:
        Y = _product(_mixed(_product(X, second[1]), first), second[0])
    elif i1 * o2 * (i2 + o1) <= o1 * i2 * (i1 + o2):
        Y = _mixed(_product(X, second[0]), first)
    else:
        Y = _product(_mixed(X, first), second[0])
    return Y.flatten(-2)


def _mixed(X: Tensor, first: Tensor) -> Tensor:
    """Return W1 X: [..., o1, k]. X: [..., i1, k]."""
    return _product(X.mT, first).mT


def _product(X: Tensor, W: Tensor) -> Tensor:
    """Return X Wᵀ, [..., out]. X: [..., in]."""
    # As matrices: of more axes, torch multiplies in another way, which rounds differently, if gradients are needed.
    return (X.reshape(-1, X.shape[-1]) @ W.T).view(*X.shape[:-1], W.shape[0])
