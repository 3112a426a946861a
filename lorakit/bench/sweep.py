"""Time steps of several runs in one pass (`lorakit sweep`) against the same steps of single runs, by rows a step.

    python -m lorakit.bench.sweep [--runs 8] [--rows 1 2 4 8 16] [--precision bf16 fp32] [--turns 5]

The embedded model, rows of E2E NLG. Each side takes full optimizer steps: loading rows, forward, backward, clipping,
AdamW. CPU time, interleaved in one process, medians; one thread without a GPU. "mixed": rows of all runs always share
micro-batches; "lorakit": as in `lorakit sweep`, which computes runs with many tokens a step separately
(`lorakit/train/micro.py`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from ..bases.load import embedded_folder
from ..train import loop
from ..train.config import TrainConfig
from ..train.progress import Progress
from ..train.run import Run
from ..train.setup import set_up, set_up_together


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.runs} runs, {args.turns} turns      alone, ms a step    mixed, throughput    lorakit, throughput")
    for precision in args.precision:
        for rows in args.rows:
            alone, mixed, ours = measure(args.runs, rows, precision, args.turns)
            total = args.runs * alone
            print(
                f"{precision}, {rows:>2} rows a step {1000 * alone:>18.0f} {total / mixed:>18.2f}x "
                f"{total / ours:>20.2f}x"
            )


def measure(runs: int, rows: int, precision: str, turns: int) -> tuple[float, float, float]:
    """Return the seconds of one run's step, of all runs' steps mixed, and of all runs' steps in lorakit's way."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=str(embedded_folder().parent / "e2e" / "train.jsonl"),
            out=f"{folder}/alone",
            steps=1000,
            precision=precision,
            threads=1,
            sample_tokens=0,
            batch_size=rows,
            validation=0,
        )
        quiet = Progress(quiet=True)
        alone = loop.Loop([Run(set_up(config), quiet)])
        configs = {
            f"r{i}": config.replace(out=str(Path(folder) / f"r{i}"), learning_rate=1e-3 * (i + 1)) for i in range(runs)
        }
        together = loop.Loop([Run(job, quiet) for job in set_up_together(configs)])
        alone.model.train()
        together.model.train()
        ours = loop.limit_for
        sides = {
            "alone": (alone, ours),
            "mixed": (together, lambda jobs: replace(ours(jobs), busy=1 << 60)),
            "lorakit": (together, ours),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns + 1):
            for name, (side, limit) in sides.items():
                loop.limit_for = limit
                for run in side.runs:
                    run.step = turn  # the same rows for all sides
                began = now()
                side._step(side.runs)
                if turn:
                    times[name].append(now() - began)
        loop.limit_for = ours
        return median(times["alone"]), median(times["mixed"]), median(times["lorakit"])


def now() -> float:
    """Return seconds of wall time on a GPU, of CPU time without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
