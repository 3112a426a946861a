"""Inference latency of adapters (Hu et al. 2021, Table 1): see `bench/latency.py`, which measures it.

LoRA's update is merged into the weights, so that the model runs its own computation; bottleneck adapters are extra
layers that each wait for the block before them. The paper measures GPT-2 medium on a GPU; here the model is smaller,
with the paper's share of the width for the bottlenecks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .suite import Budget, Finding, Result

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

TITLE = (
    "One forward pass of a GPT-2 with random weights: milliseconds for the base, and what each adapter adds, in "
    "percent of that. All sides run in turn in one process; medians of processor time (of elapsed time on a GPU). "
    "Merged LoRA runs the base's own computation, so its column is the noise."
)
BUDGET = Budget()
MERGED, ADAPTERS, UNMERGED = "LoRA, merged +%", ("adapter L +%", "adapter H +%"), ("LoRA q,v +%", "LoRA all +%")


def run(work: Work) -> Result:
    import time

    import torch

    from ..bench import latency

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    return {"rows": work.cell("all sides", lambda: latency.run(clock=clock), {})}


def tables(result: Result) -> Sequence[Table]:
    from ..bench.suite import table

    return [table(result["rows"])]


def findings(result: Result) -> Sequence[Finding]:
    rows = result["rows"]
    first, last = rows[0], rows[-1]
    noise = max(abs(row[MERGED]) for row in rows)
    least = min(first[name] for name in ADAPTERS)
    return [
        Finding(
            "merged, LoRA adds no latency",
            "agrees" if noise < least else "disagrees",
            f"at most {noise:.1f} % in either direction, which is the noise of this machine",
        ),
        Finding(
            "adapter layers add latency when a batch is small",
            "agrees" if least > noise else "within noise",
            f"{_shape(first)}: L {first[ADAPTERS[0]]:+.1f} %, H {first[ADAPTERS[1]]:+.1f} %",
        ),
        Finding(
            "with a large batch and long texts this latency nearly vanishes",
            "agrees" if all(last[name] <= noise for name in ADAPTERS) else "disagrees",
            f"{_shape(last)}: L {last[ADAPTERS[0]]:+.1f} %, H {last[ADAPTERS[1]]:+.1f} %",
        ),
        Finding(
            "unmerged, LoRA has a latency of its own (section 4.2: merging is not straightforward in mixed batches)",
            "agrees" if max(first[name] for name in UNMERGED) > noise else "within noise",
            f"{_shape(first)}: q,v {first[UNMERGED[0]]:+.1f} %, all linears {first[UNMERGED[1]]:+.1f} %",
        ),
    ]


def plot(result: Result, figure: Any) -> None:
    """Draw the slowdowns as grouped bars."""
    from ..bench import latency

    latency.plot(result["rows"], figure.subplots())


def _shape(row: dict[str, Any]) -> str:
    return f"{row['batch']} x {row['length']}"
