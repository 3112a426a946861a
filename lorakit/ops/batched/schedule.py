"""In which few products a batch is computed whose rows have adapters of their own (see `stacked`).

The factors of all adapters lie stacked, A as [ΣR, in] and Bᵀ as [ΣR, out], neighbours of equal rank side by side. A
chunk is some of the rows with a range of the stack's ranks, in one of two ways:

    batched    adapters of equal rank as one batched product: A [G, r, in], x [G, n, in]. An adapter with fewer than n
               rows
               gets one of them again, times zero
    masked     all its rows with all its ranks, then times a mask that is zero where a row does not use a rank

The first wastes little, the second needs fewer calls. What is cheaper depends on sizes and on what a call costs.
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

# what a row uses: ((which adapter, s), ...), each once, in rising order; () is the base
Row = tuple[tuple[int, float], ...]
Span = tuple[int, int]  # an adapter's ranks in a stack: the first, and the one after the last
Use = tuple[int, int, float]  # (which adapter, which row, s)

# What a chunk's two calls cost, in multiply-adds that the same core does meanwhile. Found by trying, on one Zen 4 core,
# for 32 rows with 8 and 32 adapters of rank 4 to 64 at widths 512 and 2048: a bf16 call costs at least 15 µs, an fp32
# call 2.5 µs, and both do about 45 G multiply-adds a second.
CALL = {torch.bfloat16: 5_000_000, torch.float16: 5_000_000, torch.float32: 200_000, torch.float64: 100_000}
CALL_ELSEWHERE = 200_000_000  # on an accelerator: few large calls (an estimate, not measured)
# Rows that alternate between adapters are brought together, which copies x and the update, unless runs of equal rows
# have this many tokens on average.
GATHER_BELOW = 64


class Chunk(NamedTuple):
    tokens: slice
    ranks: slice  # of the stack
    adapters: int  # G of a batched product, else 1
    scale: float | Tensor  # s: [rows, 1, 1] or, masked, [rows, 1, ranks]


class Schedule(NamedTuple):
    """`order`: which rows to bring together first; None if the chunks take them where they are, and may then take some
    twice.
    """

    order: Tensor | None
    chunks: list[Chunk]


@dataclass
class _Block:
    """A chunk in the making: the uses of each of its adapters."""

    users: list[list[Use]]
    starts: Sequence[int]  # where each adapter's ranks start in the stack
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
        alike = {self.starts[k + 1] - self.starts[k] for k in adapters} == {width // len(adapters)}
        neighbours = adapters[-1] - adapters[0] + 1 == len(adapters)
        return max(map(len, self.users)) * width if alike and neighbours else math.inf

    def uses(self) -> list[Use]:
        longest = max(map(len, self.users)) if self.batched else 0
        return [use for users in self.users for use in users + [(*users[0][:2], 0.0)] * (longest - len(users))]

    def scales(self, rows: Sequence[Row], like: Tensor) -> float | Tensor:
        """s for rows that use what `rows` says."""
        if self.batched:
            column = [sum(s for _, s in row) for row in rows]
            return (
                column[0]
                if len(set(column)) == 1
                else torch.tensor(column, dtype=like.dtype, device=like.device).view(-1, 1, 1)
            )
        mask = torch.zeros(len(rows), 1, self.ranks.stop - self.ranks.start)
        for n, row in enumerate(rows):
            for k, s in row:
                mask[n, 0, self.starts[k] - self.ranks.start : self.starts[k + 1] - self.ranks.start] = s
        return mask.to(like)


def schedule_rows(rows: Sequence[Row], ranks: Sequence[int], tokens: int, size: int, like: Tensor) -> Schedule:
    """Chunks for rows of so many tokens each. `ranks` of the stack's adapters; `size`: in + out of the layer; scales
    are made `like`.
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
        # All rows from the first to the last as they stand; those of the base among them have zeros.
        numbers = [n for users in blocks[0].users for _, n, _ in users]
        first, last = min(numbers), max(numbers) + 1
        scale = blocks[0].scales(rows[first:last], like)
        return Schedule(None, [Chunk(slice(first * tokens, last * tokens), blocks[0].ranks, 1, scale)])
    order: list[int] = []
    chunks = []
    for block in blocks:
        taken = block.uses()
        place = slice(len(order) * tokens, (len(order) + len(taken)) * tokens)
        adapters = len(block.users) if block.batched else 1
        chunks.append(Chunk(place, block.ranks, adapters, block.scales([((k, s),) for k, _, s in taken], like)))
        order += [n for _, n, _ in taken]
    return (
        Schedule(torch.tensor(order, device=like.device), chunks)
        if order != list(range(len(order)))
        else Schedule(None, chunks)
    )


def _merged(blocks: Sequence[_Block], batched: bool, call: float) -> list[_Block]:
    """Neighbours as one where that wastes less than a chunk's calls cost."""
    done: list[_Block] = []
    for block in blocks:
        if done:
            both = _Block([*done[-1].users, *block.users], block.starts, batched)
            if both.work <= done[-1].work + block.work + call:
                done[-1] = both
                continue
        done.append(block)
    return done


def in_place(rows: Sequence[Row], tokens: int) -> bool:
    """Whether runs of equal rows are so long that each is best taken where it stands. `tokens` of each row."""
    return len(rows) * tokens >= GATHER_BELOW * sum(1 for _ in itertools.groupby(rows))


def runs(rows: Sequence[Row], spans: Sequence[Span], tokens: int) -> Schedule:
    """Each run of equal rows where it is, one adapter after the other. `spans`: each adapter's ranks in the stack,
    anywhere.
    """
    chunks, place = [], 0
    for row, run in itertools.groupby(rows):
        length = sum(1 for _ in run)
        where = slice(place * tokens, (place + length) * tokens)
        chunks += [Chunk(where, slice(*spans[k]), 1, s) for k, s in row]
        place += length
    return Schedule(None, chunks)
