"""One of the two matrices of a LoHa or LoKr: a product A B of rank r, for convolutions also in Tucker form.

A B             A [out, r]    B [r, in·k...]
T ×₁ A ×₂ B     A [r, out]    B [r, in]         T [r, r, *k]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import wide


def product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Return A B as [out, in·k], or as [out, in, *k] where the tensors show the kernel's size."""
    if core is not None:
        return torch.einsum("ij...,ip,jr->pr...", core, a, b)
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def wide_product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Return `product` without gradients, in float32 (float64 stays)."""
    return product(wide(a), wide(b), None if core is None else wide(core))


def matrix_factors(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the two factors as matrices [out, r] and [r, in·k], in float64; the core goes into the second."""
    a, b = a.detach().double(), b.detach().double()
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T.contiguous(), torch.einsum("ij...,jn->in...", core.detach().double(), b).flatten(1)


def product_shape(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[int, ...]:
    """Return [out, in, *k] of the product."""
    return (a.shape[1], b.shape[1], *core.shape[2:]) if core is not None else (a.shape[0], *b.shape[1:])
