"""Norms of the rows of a weight with a low-rank update, without forming the sum (DoRA: Liu et al. 2024, equation 5).

    ‖W + s B A‖² = ‖W‖² + 2 s diag(W Aᵀ Bᵀ) + s² diag(B A Aᵀ Bᵀ)      W: [n, m]   A: [r, m]   B: [n, r]

The price is a thin product of W, instead of the full product B A and a sum as large as W. ‖W‖² does not change in
training, and is computed once. `reference` forms the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import row_blocks
from .dropout import has_no_values

# Rows of which the update leaves less than this share of ‖W‖² are formed: the sum of the three terms has lost digits.
CANCELLED = 1e-2


def reference(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ‖W + s B A‖ of each row: [n], in A's dtype."""
    return (W.to(A.dtype) + (B * scale) @ A).norm(dim=1)


def row_squares(W: Tensor) -> Tensor:
    """Return ‖W‖² of each row of W [n, m]: [n], in float64. W may be a transposed view."""
    if not W.is_contiguous() and W.T.is_contiguous():
        total = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
        for rows in row_blocks(W.T.shape):
            total += W.T[rows].double().square().sum(0)
        return total
    parts = [W[rows].double().square().sum(1) for rows in row_blocks(W.shape)]
    return torch.cat(parts) if parts else W.new_zeros(W.shape[0], dtype=torch.float64)


def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ‖W + s B A‖ of each row: [n], in A's dtype (float32 or float64), without gradients.

    squares: the `row_squares` of W; W may be a transposed view, in any precision.
    """
    with torch.no_grad():
        inner = torch.addmm(_times(W, A), B, A @ A.T, beta=2, alpha=scale)  # 2 W Aᵀ + s B A Aᵀ
        total = squares + (inner * B).sum(1).mul_(scale)
        # Elsewhere than on a CPU, the question would make the device wait.
        if W.device.type == "cpu" and not has_no_values(W) and not torch.compiler.is_compiling():
            cancelled = total < CANCELLED * squares
            if cancelled.any():
                V = torch.addmm(W[cancelled].double(), B[cancelled].double(), A.double(), alpha=scale)
                total[cancelled] = V.square().sum(1)
        return total.clamp_min_(0).sqrt_().to(A.dtype)


def _times(W: Tensor, A: Tensor) -> Tensor:
    """Return W Aᵀ [n, r] in A's dtype, without a copy of all of W in that dtype."""
    if W.dtype == A.dtype:
        return W @ A.T
    if not W.is_contiguous() and W.T.is_contiguous():
        total = A.new_zeros(A.shape[0], W.shape[0])
        for rows in row_blocks(W.T.shape):
            total.addmm_(A[:, rows], W.T[rows].to(A.dtype))
        return total.T
    return torch.cat([W[rows].to(A.dtype) @ A.T for rows in row_blocks(W.shape)])
