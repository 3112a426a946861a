"""What adapters leave in memory, for `bench serve`: loaded and unloaded a hundred times, and a thousand registered.

In a process of its own, which has nothing else to free: `python -m lorakit.bench.serve_memory` prints the rows as JSON.

    cycles        an adapter of about 20 MB is loaded, answers a request and is unloaded; the memory after the last
                  cycle is compared with that after the tenth, when every buffer has been used
    registered    small adapters, each of which answers a request; the memory added, over what the tiers may hold:
                  twice the size of those with a place on the device, as `route` stacks a copy with spare room, and
                  the bound of those in memory
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..bases.limits import resident
from ..serve.embedded.engine import EmbeddedEngine
from ..serve.engine import Sampling, Work
from .serve_cold import MEGABYTES, OnDisk, rank_of, saved
from .serve_sides import engine_for
from .suite import Row
from .train_step import Shape, llama

SETTLED = 10  # cycles before the first reading
SMALL, EMBEDDED = Shape(hidden=128, layers=1, ffn=256), Shape(hidden=256, layers=6, ffn=704)
COPIES = 2.2  # of an adapter with a place: its parameters, and the stacks


def memory(quick: bool) -> list[Row]:
    """Return both rows, measured in another process."""
    command = [sys.executable, "-m", __name__, *(["quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError("the process that measures memory failed; its message is above")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def cycles(quick: bool) -> Row:
    """Return by how much memory grows while an adapter comes and goes."""
    shape, count, megabytes = (SMALL, 5, 1.0) if quick else (Shape(), 100, MEGABYTES)
    with tempfile.TemporaryDirectory() as folder:
        rank, size = rank_of(shape, megabytes)
        source = saved(shape, Path(folder) / "comes", rank)
        model = llama(shape, torch.float32).eval()
        before, after = asyncio.run(_come_and_go(engine_for(model, device=4), source, count))
    return {
        "model": f"{shape.hidden} x {shape.layers}",
        "memory": f"{count} x load, answer, unload of {size / 1e6:.0f} MB",
        "before MB": round(before / 1e6),
        "after MB": round(after / 1e6),
        "growth %": round(100 * (after - before) / before, 1) if before else None,
    }


def registered(quick: bool) -> Row:
    """Return the memory that many adapters take together."""
    shape, count, places, bound = (SMALL, 20, 4, 1 << 20) if quick else (EMBEDDED, 1000, 32, 200 << 20)
    with tempfile.TemporaryDirectory() as folder:
        rank, size = rank_of(shape, 1.0)
        source = saved(shape, Path(folder) / "one", rank)
        model = llama(shape, torch.float32).eval()
        engine = engine_for(model, device=places, memory_bytes=bound)
        before, after = asyncio.run(_register(engine, source, count))
    allowed = places * size * COPIES + bound
    return {
        "model": f"{shape.hidden} x {shape.layers}",
        "memory": f"{count:,} registered of {size / 1e6:.1f} MB: {places} places, {bound / 1e6:.0f} MB beside",
        "before MB": round(before / 1e6),
        "after MB": round(after / 1e6),
        "added over allowed": round((after - before) / allowed, 2) if before else None,
    }


async def _come_and_go(engine: EmbeddedEngine, source: OnDisk, count: int) -> tuple[int, int]:
    await engine.start()
    before = 0
    for n in range(SETTLED + count):
        await engine.load(f"key{n}", source)
        await _answer(engine, f"key{n}")
        await engine.unload(f"key{n}")
        if n == SETTLED - 1:
            before = resident()
    after = resident()
    await engine.stop(0)
    return before, after


async def _register(engine: EmbeddedEngine, source: OnDisk, count: int) -> tuple[int, int]:
    await engine.start()
    await engine.load("first", source)  # what the first one brings, such as code and the forward's buffers, is not its
    await _answer(engine, "first")
    await engine.unload("first")
    before = resident()
    for n in range(count):
        await engine.load(f"key{n}", source)
        await _answer(engine, f"key{n}")
    after = resident()
    await engine.stop(0)
    return before, after


async def _answer(engine: EmbeddedEngine, key: str) -> None:
    work = Work(tuple(range(10, 26)), ((key, 1.0),), Sampling(max_tokens=2, temperature=0.0))
    async for _ in engine.submit(work):
        pass


if __name__ == "__main__":
    print(json.dumps([measure("quick" in sys.argv) for measure in (cycles, registered)]))
