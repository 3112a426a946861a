"""What a cold adapter costs, for `bench serve`: its own first token, and the steps of the streams beside it.

Wall time, as waiting is what a client sees: of little worth on a machine that does other work.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

import lorakit as lk

from ..serve.embedded.engine import EmbeddedEngine
from ..serve.engine import Choice, Sampling, Work
from .serve_sides import Kept, engine_for
from .suite import Row
from .train_step import PROJECTIONS, Shape, llama

MEGABYTES = 20
STREAMS = 8  # that run while the adapter loads


@dataclass(frozen=True)
class OnDisk:
    """An adapter's folder, as an engine's source."""

    label: str
    path: Path

    def read(self) -> lk.Adapter:
        return lk.Adapter.load(self.path)


def cold(quick: bool) -> list[Row]:
    """Return a row: milliseconds to the first token beyond a warm adapter's, and by which other streams' steps grow."""
    shape = Shape(layers=2) if quick else Shape()
    attached, rounds = (4, 2) if quick else (32, 7)
    with tempfile.TemporaryDirectory() as folder:
        rank, size = rank_of(shape, MEGABYTES)
        sources = [saved(shape, Path(folder) / f"cold{n}", rank) for n in range(rounds)]
        model = llama(shape, torch.float32).eval()
        ready = [Kept(f"warm{n}", fresh(shape, 8)) for n in range(attached - 1)]
        figures = asyncio.run(_measured(engine_for(model, rows=STREAMS + 2, device=attached), ready, sources))
    return [
        {
            "model": f"{shape.hidden} x {shape.layers}",
            "cold adapter": f"{size / 1e6:.0f} MB, {attached} places, {STREAMS} streams",
            "step ms": round(1e3 * median(step for _, _, step, _ in figures), 1),
            "warm ms": round(1e3 * median(warm for _, warm, _, _ in figures), 1),
            "cold beyond warm ms": round(1e3 * median(cold - warm for cold, warm, _, _ in figures)),
            "others wait beyond a step ms": round(1e3 * median(longest - step for _, _, step, longest in figures)),
        }
    ]


def rank_of(shape: Shape, megabytes: float) -> tuple[int, int]:
    """Return the rank whose adapter on all seven linears has about this size in float32, and the size in bytes."""
    per_rank = 4 * shape.layers * (4 * 2 * shape.hidden + 3 * (shape.hidden + shape.ffn))
    rank = max(1, round(megabytes * 1e6 / per_rank))
    return rank, rank * per_rank


def fresh(shape: Shape, rank: int) -> lk.Adapter:
    """Return an adapter of the model with B = 0."""
    return lk.capture(lk.attach(llama(shape, torch.float32), lk.LoraConfig(rank=rank, targets=PROJECTIONS)))


def saved(shape: Shape, path: Path, rank: int) -> OnDisk:
    """Write an adapter to a folder."""
    fresh(shape, rank).save(path)
    return OnDisk(path.name, path)


async def _measured(
    engine: EmbeddedEngine, ready: Sequence[Kept], sources: Sequence[OnDisk]
) -> list[tuple[float, float, float, float]]:
    """Return (cold, warm, step, longest wait) in seconds of each cold adapter."""
    await engine.start()
    for warm in ready:
        await engine.load(warm.label, warm)
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    streams = [
        asyncio.create_task(_record(engine, ((ready[n % len(ready)].label, 1.0),), 3000, arrivals[n]))
        for n in range(STREAMS)
    ]
    figures = []
    try:
        await asyncio.sleep(1)
        for source in sources:
            began = time.perf_counter()
            await engine.load(source.label, source)
            cold = await _first(engine, source.label) - began
            ended = time.perf_counter()
            waits = [wait for times in arrivals for wait in _waits(times, began, ended)]
            began = time.perf_counter()
            again = await _first(engine, source.label) - began
            usual = [wait for times in arrivals for wait in _waits(times, began - 1, began)]
            figures.append((cold, again, median(usual), max(waits)))
            await asyncio.sleep(0.5)
    finally:
        for stream in streams:
            stream.cancel()
        await engine.stop(0)
    return figures


async def _first(engine: EmbeddedEngine, key: str) -> float:
    """Return when the first token of an answer came."""
    arrived: list[float] = []
    await _record(engine, ((key, 1.0),), 1, arrived)
    return arrived[0]


async def _record(engine: EmbeddedEngine, choice: Choice, new: int, arrivals: list[float]) -> None:
    work = Work(tuple(range(10, 26)), choice, Sampling(max_tokens=new, temperature=0.0))
    async for piece in engine.submit(work):
        if piece.ids:
            arrivals.append(time.perf_counter())


def _waits(times: Sequence[float], began: float, ended: float) -> list[float]:
    """Return the waits between a stream's tokens that overlap a span of time, also one that has not ended yet."""
    closed = [*times, ended] if times and times[-1] < ended else list(times)
    return [after - before for before, after in pairwise(closed) if after > began and before < ended]
