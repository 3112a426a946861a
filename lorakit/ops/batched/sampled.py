"""Add the low-rank updates of few tokens that use many adapters, in two calls, wherever these are in the stack.

    down[n, j] = s[n, j] · (x[n] · A[j])        for the ranks j that token n uses, no others
    y[n]      += Σ_j down[n, j] · Bᵀ[j]

    x: [N, in]   y: [N, out]   A: [ΣR, in]   Bᵀ: [ΣR, out]

The first line is a sampled matrix product (`torch.sparse.sampled_addmm`), the second a weighted lookup
(`embedding_bag`). Both read only the ranks in use, and nothing is copied or moved, so the stack may contain hundreds of
idle adapters, and a batch with a new mix of adapters costs no more than a repeated one. But each token reads its
adapter's factors separately. A matrix product (see `schedule`) reads them once for all tokens of an adapter, and is
faster if these are many.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Row, Span

# Up to this many tokens per adapter in use, these two calls beat the many products of `schedule` (one EPYC core, fp32,
# 8 or 32 rows, widths 512 and 2048: 0.45 to 1.1 times as long up to 8 tokens each, 1.1 to 1.8 times from 14 on; for a
# single adapter always 1.4 times and more).
MOST_TOKENS_EACH = 8


class Pattern(NamedTuple):
    """Which ranks each token uses."""

    ranks: Tensor  # [nonzeros]
    starts: Tensor  # [N], the index in `ranks` where each token's ranks start
    scale: Tensor | None  # [nonzeros], s of each; None if all are 1
    down: Tensor  # [N, ΣR], sparse; overwritten at every use


def pays(rows: Sequence[Row], tokens: int, like: Tensor) -> bool:
    """Whether this is faster than matrix products. sampled_addmm has no 16 bits; GPUs prefer few large products.

    `tokens`: of each row.
    """
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return False
    uses = [k for row in rows for k, _ in row]
    return len(set(uses)) > 1 and len(uses) * tokens <= MOST_TOKENS_EACH * len(set(uses))


def pattern(rows: Sequence[Row], spans: Sequence[Span], tokens: int, width: int, like: Tensor) -> Pattern:
    """Build the pattern of rows with `tokens` tokens each. `spans`: each adapter's ranks in a stack of `width`."""
    ranks: list[int] = []
    scales: list[float] = []
    ends = [0]
    for row in rows:
        own = [j for k, _ in row for j in range(*spans[k])]
        factors = [s for k, s in row for _ in range(*spans[k])]
        for _ in range(tokens):
            ranks += own
            scales += factors
            ends.append(len(ranks))
    # Not inference tensors: a pattern is cached for later batches, which may run outside inference mode.
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        crow, columns = torch.tensor(ends), torch.tensor(ranks, dtype=torch.long)
        zeros = torch.zeros(len(ranks), dtype=like.dtype)
        down = torch.sparse_csr_tensor(crow, columns, zeros, (len(ends) - 1, width), check_invariants=False)
        scale = torch.tensor(scales, dtype=like.dtype) if any(s != 1 for s in scales) else None
        return Pattern(columns, crow[:-1].contiguous(), scale, down)


def add_sampled(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, pattern: Pattern) -> None:
    """Add the updates to y in place, without gradients, on a CPU, in float32 or float64. y: [N, out], contiguous."""
    torch.sparse.sampled_addmm(pattern.down, x, A.T, beta=0.0, out=pattern.down)
    down = pattern.down.values()
    if pattern.scale is not None:
        down.mul_(pattern.scale)
    y.add_(F.embedding_bag(pattern.ranks, Bt, pattern.starts, mode="sum", per_sample_weights=down))
