"""Which rows are computed together: a step's rows, of one run or of several, as micro-batches.

One run's rows go by length, so that little padding is computed. Of several runs those with few tokens share
micro-batches, each run's rows side by side and all of them together, so that runs of equal batches are groups of equal
size (see `ops.groups`); those that keep the machine busy by themselves are computed by themselves, exactly as each
would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tasks.task import Item
from . import defaults

if TYPE_CHECKING:
    from .setup import Job

# From so many tokens in a run's batch on it has micro-batches of its own: the products are as fast as they get, and a
# run by itself has fused blocks. Embedded model, 8 runs, one thread, bf16, throughput of mixed micro-batches over runs
# one by one, rows of about 45 tokens: 1 row each 1.9, 2 rows 1.6, 4 rows 1.5, 8 rows 0.97, 16 rows 0.96
# (bench/sweep.py, on a busy machine).
BUSY_CPU = 320
# Not measured: what such a device takes to be busy is several times that.
BUSY = 4096


@dataclass(frozen=True)
class MicroBatch:
    """Rows, and which run (by its place) each of them belongs to: runs in order, `counts` rows of each."""

    items: list[Item]
    runs: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Limit:
    """What may be computed at once: so many rows of one run; of several runs so many rows, or tokens with their
    padding.
    """

    own_rows: Sequence[int]  # of each run
    rows: int | None
    tokens: int | None
    busy: int

    def allows(self, rows: int, longest: int) -> bool:
        return (self.rows is None or rows <= self.rows) and (self.tokens is None or rows * longest <= self.tokens)


def limit_for(jobs: Sequence[Job]) -> Limit:
    """`micro_batch` rows if it is given; otherwise about as much as one run alone computes at once."""
    first = jobs[0]
    given = None if first.config.micro_batch == "auto" else int(first.config.micro_batch)
    on_cpu = first.parallel.device.type == "cpu"
    tokens = None if given else defaults.CPU_TOKENS if on_cpu else BUSY
    return Limit([job.micro_batch.value for job in jobs], given, tokens, BUSY_CPU if on_cpu else BUSY)


def micro_batches(batches: Sequence[Sequence[Item]], limit: Limit) -> list[MicroBatch]:
    """All rows of each run's batch; a batch may be empty."""
    ordered = {run: sorted(batch, key=lambda item: item.size) for run, batch in enumerate(batches) if batch}
    longest = {run: batch[-1].size for run, batch in ordered.items()}
    own = [
        run
        for run, batch in ordered.items()
        if len(ordered) == 1 or len(batch) * longest[run] >= limit.busy or not limit.allows(len(batch), longest[run])
    ]
    parts = []
    for run in own:
        most, batch = limit.own_rows[run], ordered[run]
        parts += [
            MicroBatch(part := batch[i : i + most], [run] * len(part), [len(part)]) for i in range(0, len(batch), most)
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
