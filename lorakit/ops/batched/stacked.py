"""Add the low-rank updates of a batch that mixes adapters.

    y[n] += Σ_k s[n, k] · (x[n] A_kᵀ) B_kᵀ        x: [rows, ..., in]   y: [rows, ..., out]
                                                  A_k: [r_k, in]       B_k: [out, r_k]

s is an adapter's weight in that row (times its scale, unless B includes it), and zero if the row does not use it.

`reference` is that line. `add_stacked` is for serving, without gradients: all A are stacked as [ΣR, in] and all Bᵀ as
[ΣR, out], without padding to equal ranks, and few products use ranges of them (see `schedule`). For training see
`segments`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Chunk, Row, Schedule

ChunkFactors = tuple[Tensor, Tensor]  # Aᵀ [in, r] and Bᵀ [r, out] of a chunk; batched [G, in, r] and [G, r, out]


def reference(y: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor]], rows: Sequence[Row]) -> Tensor:
    """Compute the equation row by row. `factors`: A, B of each adapter; `rows`: the adapters of each row."""
    outputs = []
    for n, row in enumerate(rows):
        updates = [s * F.linear(F.linear(x[n], factors[k][0].to(x.dtype)), factors[k][1].to(x.dtype)) for k, s in row]
        outputs.append(sum(updates, y[n]))
    return torch.stack(outputs) if outputs else y


def chunk_factors(A: Tensor, Bt: Tensor, schedule: Schedule) -> list[ChunkFactors]:
    """Return each chunk's part of a stack A [ΣR, in], Bt [ΣR, out], as views.

    They are worth caching: creating them costs as much as a small product.
    """
    parts = []
    for _, ranks, adapters, *_ in schedule.chunks:
        At, Bt_k = A[ranks].T, Bt[ranks]
        if adapters > 1:
            At, Bt_k = A[ranks].unflatten(0, (adapters, -1)).transpose(1, 2), Bt_k.unflatten(0, (adapters, -1))
        parts.append((At, Bt_k))
    return parts


def add_stacked(y: Tensor, x: Tensor, parts: Sequence[ChunkFactors], schedule: Schedule) -> None:
    """Add the updates to y in place, without gradients.

    y: [N, out], x: [N, in], both contiguous; `parts`: the `chunk_factors` of this schedule.
    """
    if schedule.order is None:
        for chunk, (At, Bt) in zip(schedule.chunks, parts, strict=True):
            adapters, down, out = chunk.adapters, _down(x[chunk.tokens], At, chunk), y[chunk.tokens]
            if adapters == 1:
                out.addmm_(down, Bt)
            else:
                out.view(adapters, -1, out.shape[1]).baddbmm_(down, Bt)
        return
    rows = schedule.order.shape[0]
    tokens_each = schedule.chunks[-1].tokens.stop // rows
    gathered = x.view(-1, tokens_each * x.shape[1]).index_select(0, schedule.order).view(-1, x.shape[1])
    update = y.new_empty(rows * tokens_each, y.shape[1])
    for chunk, (At, Bt) in zip(schedule.chunks, parts, strict=True):
        adapters, down, out = chunk.adapters, _down(gathered[chunk.tokens], At, chunk), update[chunk.tokens]
        if adapters == 1:
            torch.mm(down, Bt, out=out)
        else:
            torch.bmm(down, Bt, out=out.view(adapters, -1, out.shape[1]))
    y.view(-1, tokens_each * y.shape[1]).index_add_(0, schedule.order, update.view(rows, -1))


def _down(x: Tensor, At: Tensor, chunk: Chunk) -> Tensor:
    """Return s · x Aᵀ: [tokens, r], or batched [G, tokens / G, r]."""
    adapters, scale, unused = chunk.adapters, chunk.scale, chunk.unused
    if adapters == 1 and x.shape[0] <= 4 and x.dtype == torch.float32:
        # MKL is faster transposed: 4 rows, rank 64, width 2048 in 33 instead of 51 µs.
        down = torch.mm(At.T, x.T).T
    elif adapters == 1:
        down = torch.mm(x, At)
    elif x.shape[0] == adapters and x.dtype == torch.float32:
        # As a batch of matrix times vector, for which MKL takes half the time of vector times matrix (rank 64, width
        # 512: 24 against 53 µs).
        down = torch.bmm(At.transpose(1, 2), x.unsqueeze(1).transpose(1, 2)).view(adapters, 1, -1)
    else:
        down = torch.bmm(x.view(adapters, -1, x.shape[1]), At)
    if isinstance(scale, Tensor):
        down.view(scale.shape[0], -1, down.shape[-1]).mul_(scale)
    elif scale != 1:
        down.mul_(scale)
    if unused is not None:
        down.view(unused.shape[0], -1, down.shape[-1]).masked_fill_(unused, 0)
    return down
