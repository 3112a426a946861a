"""Schedule the matrix products for a batch that mixes adapters, so that they are few (see `stacked`).

The factors of all adapters are stacked, A as [ΣR, in] and Bᵀ as [ΣR, out], with adapters of equal rank adjacent. A
chunk computes some of the rows with a range of the stack's ranks, in one of two ways:

    batched    adapters of equal rank as one batched product: A [G, r, in], x [G, n, in]; an adapter with fewer than n
               rows has one of them repeated, times zero
    masked     all rows times all ranks, then zero where a row does not use a rank: set, not multiplied by a mask, as
               an adapter's factors may overflow with another's row, and inf · 0 would be that row's NaN

The first wastes little work, the second needs fewer calls. Which is cheaper depends on the sizes and a call's cost.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# the adapters of a row: ((adapter's index, s), ...), each once, in ascending order; () is the base
Row = tuple[tuple[int, float], ...]
Span = tuple[int, int]  # an adapter's ranks in a stack: the first, and one past the last
Use = tuple[int, int, float]  # (adapter's index, row's index, s)

# The cost of a chunk's two calls, in the multiply-adds that a core does in that time. Tuned on one Zen 4 core for 32
# rows with 8 and 32 adapters of rank 4 to 64 at widths 512 and 2048: a bf16 call costs at least 15 µs, an fp32 call
# 2.5 µs, and both do about 45 G multiply-adds per second.
CALL = {torch.bfloat16: 5_000_000, torch.float16: 5_000_000, torch.float32: 200_000, torch.float64: 100_000}
CALL_ELSEWHERE = 200_000_000  # on an accelerator, which prefers few large calls (an estimate, not measured)
# Rows of the same adapter are gathered, which copies x and the update, unless runs of equal rows already have this many
# tokens on average.
GATHER_BELOW = 64


class Chunk(NamedTuple):
    """A range of tokens times a range of ranks."""

    tokens: slice
    ranks: slice  # of the stack
    adapters: int  # G of a batched product, else 1
    scale: float | Tensor  # s: [rows, 1, 1] or, masked, [rows, 1, ranks]
    unused: Tensor | None = None  # masked: the ranks that a row does not use, [rows, 1, ranks]


class Schedule(NamedTuple):
    """`order`: the rows to gather first; None if chunks read x in place, where they may overlap."""

    order: Tensor | None
    chunks: list[Chunk]


@dataclass
class _Block:
    """A chunk being built: the uses of each of its adapters."""

    users: list[list[Use]]
    starts: Sequence[int]  # the first rank of each adapter in the stack
    batched: bool = True

    @property
    def ranks(self) -> slice:
        return slice(self.starts[self.users[0][0][0]], self.starts[self.users[-1][0][0] + 1])

    @property
    def work(self) -> float:
        """Rows times ranks."""
        width = self.ranks.stop - self.ranks.start
        if not self.batched:
            return sum(map(len, self.users)) * width
        adapters = [users[0][0] for users in self.users]
        equal_ranks = {self.starts[k + 1] - self.starts[k] for k in adapters} == {width // len(adapters)}
        adjacent = adapters[-1] - adapters[0] + 1 == len(adapters)
        return max(map(len, self.users)) * width if equal_ranks and adjacent else math.inf

    def uses(self) -> list[Use]:
        longest = max(map(len, self.users)) if self.batched else 0
        return [use for users in self.users for use in users + [(*users[0][:2], 0.0)] * (longest - len(users))]

    def scales(self, rows: Sequence[Row], like: Tensor) -> tuple[float | Tensor, Tensor | None]:
        """Return s for these rows, and which ranks they do not use."""
        if self.batched:
            column = [sum(s for _, s in row) for row in rows]
            if len(set(column)) == 1:
                return column[0], None
            return torch.tensor(column, dtype=like.dtype, device=like.device).view(-1, 1, 1), None
        mask = torch.zeros(len(rows), 1, self.ranks.stop - self.ranks.start)
        for n, row in enumerate(rows):
            for k, s in row:
                mask[n, 0, self.starts[k] - self.ranks.start : self.starts[k + 1] - self.ranks.start] = s
        unused = (mask == 0).to(like.device)
        return 1.0 if {s for row in rows for _, s in row} == {1.0} else mask.to(like), unused


def schedule_rows(rows: Sequence[Row], ranks: Sequence[int], tokens: int, size: int, like: Tensor) -> Schedule:
    """Schedule rows of `tokens` tokens each.

    `ranks`: of each adapter in the stack; `size`: in + out of the layer; `like`: the dtype and device of the products.
    """
    starts = [0, *itertools.accumulate(ranks)]
    if in_place(rows, tokens):
        return runs(rows, list(itertools.pairwise(starts)), tokens)
    uses = sorted((k, n, s) for n, row in enumerate(rows) for k, s in row)
    blocks = [_Block([list(users)], starts) for _, users in itertools.groupby(uses, key=operator.itemgetter(0))]
    call = (CALL.get(like.dtype, CALL[torch.float32]) if like.device.type == "cpu" else CALL_ELSEWHERE) / (
        max(tokens, 1) * size
    )
    for batched in (True, False):
        blocks = _merged(blocks, batched, call)
    if len(blocks) == 1 and (len(blocks[0].users) == 1 or not blocks[0].batched):
        # All rows from the first to the last in place; the base's rows among them have zeros.
        used_rows = [n for users in blocks[0].users for _, n, _ in users]
        first, last = min(used_rows), max(used_rows) + 1
        scales = blocks[0].scales(rows[first:last], like)
        return Schedule(None, [Chunk(slice(first * tokens, last * tokens), blocks[0].ranks, 1, *scales)])
    order: list[int] = []
    chunks = []
    for block in blocks:
        uses_of_block = block.uses()
        position = slice(len(order) * tokens, (len(order) + len(uses_of_block)) * tokens)
        adapters = len(block.users) if block.batched else 1
        scales = block.scales([((k, s),) for k, _, s in uses_of_block], like)
        chunks.append(Chunk(position, block.ranks, adapters, *scales))
        order += [n for _, n, _ in uses_of_block]
    return (
        Schedule(torch.tensor(order, device=like.device), chunks)
        if order != list(range(len(order)))
        else Schedule(None, chunks)
    )


def _merged(blocks: Sequence[_Block], batched: bool, call: float) -> list[_Block]:
    """Merge adjacent blocks if that wastes less work than a chunk's calls cost."""
    merged: list[_Block] = []
    for block in blocks:
        if merged:
            both = _Block([*merged[-1].users, *block.users], block.starts, batched)
            if both.work <= merged[-1].work + block.work + call:
                merged[-1] = both
                continue
        merged.append(block)
    return merged


def in_place(rows: Sequence[Row], tokens: int) -> bool:
    """Whether runs of equal rows are long enough to compute each in place. `tokens`: of each row."""
    return len(rows) * tokens >= GATHER_BELOW * sum(1 for _ in itertools.groupby(rows))


def gathered_already(rows: Sequence[Row], like: Tensor) -> bool:
    """Whether all rows of each adapter are adjacent, and a call costs so little that each may have its own.

    Prompts that are prefilled together are such rows. Then gathering only makes calls fewer, for two copies of the rows
    and one of the factors: in float32, eight rows of 8 to 32 tokens took 1.15 to 1.25 times as long so, at widths 256,
    512 and 2048. In bfloat16, where a call costs more, they took 0.4 to 1.1 times as long.
    """
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return False
    used = [k for row, _ in itertools.groupby(rows) for k, _ in row]
    return len(used) == len(set(used))


def runs(rows: Sequence[Row], spans: Sequence[Span], tokens: int) -> Schedule:
    """Schedule each run of equal rows in place, one adapter at a time. `spans`: each adapter's ranks in the stack."""
    chunks, start = [], 0
    for row, run in itertools.groupby(rows):
        length = sum(1 for _ in run)
        tokens_of_run = slice(start * tokens, (start + length) * tokens)
        chunks += [Chunk(tokens_of_run, slice(*spans[k]), 1, s) for k, s in row]
        start += length
    return Schedule(None, chunks)
