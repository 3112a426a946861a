"""Low-rank updates of few tokens that use many adapters, in two calls, wherever the adapters lie in a stack.

    down[n, j] = s[n, j] · (x[n] · A[j])        for the ranks j that token n uses, no others
    y[n]      += Σ_j down[n, j] · Bᵀ[j]

x: [N, in]   y: [N, out]   A: [ΣR, in]   Bᵀ: [ΣR, out]. The first line is a sampled matrix product
                                         (`torch.sparse.sampled_addmm`),
the second a weighted lookup (`embedding_bag`). Both read just the ranks in use, so the stack may hold hundreds of idle
adapters, and
a batch that names others costs the same as one that names those of the step before: nothing is copied or brought side
by side.
Each token works alone, though: of an adapter that many tokens use, a matrix product (see `schedule`) reads the factors
once for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Row, Span

# Up to so many tokens for each adapter in use these two calls beat the products of `schedule`, which then have to be
# many (one EPYC core, fp32, 8 or 32 rows, widths 512 and 2048: 0.45 to 1.1 times as long up to 8 tokens each, 1.1 to
# 1.8 times from 14 on; for an adapter alone always 1.4 times and more).
MOST_TOKENS_EACH = 8


class Pattern(NamedTuple):
    """Which ranks each token uses. `scale`: s for each of them, None for 1 throughout. `down` is written anew at every
    use.
    """

    ranks: Tensor  # [nonzeros]
    starts: Tensor  # [N], where each token's ranks start
    scale: Tensor | None
    down: Tensor  # [N, ΣR], sparse


def pays(rows: Sequence[Row], tokens: int, like: Tensor) -> bool:
    """Whether this is the faster way. sampled_addmm does not know 16 bits; other devices like few large products."""
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return False
    uses = [k for row in rows for k, _ in row]
    return len(set(uses)) > 1 and len(uses) * tokens <= MOST_TOKENS_EACH * len(set(uses))


def pattern(rows: Sequence[Row], spans: Sequence[Span], tokens: int, width: int, like: Tensor) -> Pattern:
    """The pattern of rows with so many tokens each. `spans`: each adapter's ranks in the stack, of `width` ranks in
    all.
    """
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
    # Not inference tensors: a pattern is kept for later batches, which may run in another mode.
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        crow, columns = torch.tensor(ends), torch.tensor(ranks, dtype=torch.long)
        zeros = torch.zeros(len(ranks), dtype=like.dtype)
        down = torch.sparse_csr_tensor(crow, columns, zeros, (len(ends) - 1, width), check_invariants=False)
        scale = torch.tensor(scales, dtype=like.dtype) if any(s != 1 for s in scales) else None
        return Pattern(columns, crow[:-1].contiguous(), scale, down)


def add_sampled(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, how: Pattern) -> None:
    """Write the updates into y: [N, out], contiguous, without gradients. On a CPU, in float32 or float64."""
    torch.sparse.sampled_addmm(how.down, x, A.T, beta=0.0, out=how.down)
    down = how.down.values()
    if how.scale is not None:
        down.mul_(how.scale)
    y.add_(F.embedding_bag(how.ranks, Bt, how.starts, mode="sum", per_sample_weights=down))
