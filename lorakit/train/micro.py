"""Divide a step's rows, of one run or of several, into micro-batches.

A run's rows are sorted by length to reduce padding. In a sweep, runs with few tokens share micro-batches. Each run's
rows stay together and adjacent, so equal batches form equal groups (see `ops.groups`). A run whose batch is large
enough to use the machine fully has its own micro-batches, exactly as it would alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from ..tasks.task import Item

if TYPE_CHECKING:
    from .setup import Job

# From this many tokens on, a run's batch has micro-batches of its own: its matrix products are at full speed, and a
# single run uses fused blocks. Throughput of mixed micro-batches relative to runs one by one (embedded model, 8 runs,
# one thread, bf16, rows of about 45 tokens; bench/sweep.py, on a busy machine): 1 row each 1.9, 2 rows 1.6, 4 rows 1.5,
# 8 rows 0.97, 16 rows 0.96.
BUSY_CPU = 320
# The same for other devices. Not measured; they need several times as many tokens.
BUSY = 4096


@dataclass(frozen=True)
class MicroBatch:
    """Rows with the index of the run each belongs to, run after run. `counts`: rows of each run in it."""

    items: list[Item]
    runs: list[int]
    counts: list[int]

    def rows_by_run(self) -> list[list[Item]]:
        """Return each run's rows."""
        ends = list(accumulate(self.counts, initial=0))
        return [self.items[start:end] for start, end in pairwise(ends)]


@dataclass(frozen=True)
class Limit:
    """The size of micro-batches. `own_rows`: rows at once of each run alone; `rows`, `tokens` (with padding): at once
    of several runs; `busy`: tokens from which a run's batch is computed alone.
    """

    own_rows: Sequence[int]
    rows: int | None
    tokens: int | None
    busy: int

    def allows(self, rows: int, longest: int) -> bool:
        """Whether `rows` rows of several runs, padded to `longest` tokens, fit into one micro-batch."""
        return (self.rows is None or rows <= self.rows) and (self.tokens is None or rows * longest <= self.tokens)


def limit_for(jobs: Sequence[Job]) -> Limit:
    """Return the limit for jobs that train together: `micro_batch` rows if configured, else about what one run uses."""
    first = jobs[0]
    rows = None if first.config.micro_batch == "auto" else int(first.config.micro_batch)
    on_cpu = first.parallel.device.type == "cpu"
    tokens = None if rows else first.task.size_at_once(first.parallel.device) or BUSY
    busy = (BUSY_CPU if on_cpu else BUSY) if first.task.shares else 0
    return Limit([job.micro_batch.value for job in jobs], rows, tokens, busy)


def micro_batches(batches: Sequence[Sequence[Item]], limit: Limit) -> list[MicroBatch]:
    """Divide the runs' batches into micro-batches, each with items of one group.

    A batch may be empty (of a process without rows).
    """
    groups = dict.fromkeys(item.group for batch in batches for item in batch)
    of_groups = [[[item for item in batch if item.group == group] for batch in batches] for group in groups]
    parts = [part for each in of_groups for part in _of_one_group(each, limit)]
    # All of a run's own ones together, so that it draws the random numbers that it would draw alone.
    return sorted(parts, key=lambda part: part.runs[0]) if len(of_groups) > 1 else parts


def _of_one_group(batches: Sequence[Sequence[Item]], limit: Limit) -> list[MicroBatch]:
    ordered = {run: sorted(batch, key=lambda item: item.size) for run, batch in enumerate(batches) if batch}
    longest = {run: batch[-1].size for run, batch in ordered.items()}
    own = [
        run
        for run, batch in ordered.items()
        if len(ordered) == 1 or len(batch) * longest[run] >= limit.busy or not limit.allows(len(batch), longest[run])
    ]
    parts = []
    for run in own:
        size, batch = limit.own_rows[run], ordered[run]
        parts += [
            MicroBatch(part := batch[i : i + size], [run] * len(part), [len(part)]) for i in range(0, len(batch), size)
        ]
    shared: list[list[int]] = []  # runs that share a micro-batch
    for run in sorted(ordered.keys() - set(own), key=lambda run: (longest[run], run)):
        if shared and limit.allows(sum(len(ordered[other]) for other in [*shared[-1], run]), longest[run]):
            shared[-1].append(run)
        else:
            shared.append([run])
    return parts + [_together({run: ordered[run] for run in runs}) for runs in shared]


def _together(batches: dict[int, list[Item]]) -> MicroBatch:
    rows = [(run, item) for run, batch in batches.items() for item in batch]
    return MicroBatch([item for _, item in rows], [run for run, _ in rows], [len(batch) for batch in batches.values()])
