"""Adapters of tiny models as sources for `serve.embedded.tiers`, and the passes of an engine without a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.serve.embedded.tiers import Tiers

Result = TypeVar("Result")
IDS = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 35], [8, 9, 7, 9], [32, 38, 46, 2]])


class Given:
    """A source that gives the adapter it was made with. `reads`: how often; `error`: what it raises instead."""

    def __init__(self, adapter: lk.Adapter, label: str = "sql"):
        self.adapter, self.label = adapter, label
        self.reads = 0
        self.error: Exception | None = None

    def read(self) -> lk.Adapter:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return self.adapter


def made(make: Callable[[], nn.Module], seed: int = 1, **settings) -> lk.Adapter:
    """An adapter of this config for the model that `make` makes, of random numbers."""
    model = make()
    lk.attach(model, lk.LoraConfig(**({"rank": 2, "targets": ["q_proj", "down_proj"]} | settings)))
    return lk.capture(tiny.randomise_factors(model, seed))


def of_rank(rank: int, seed: int, like: lk.Adapter) -> lk.Adapter:
    """A LoRA of another rank for the same modules, made without a model."""
    made = torch.Generator().manual_seed(seed)

    def pair(update: lk.Factors) -> lk.Factors:
        A = torch.randn(rank, update.A.shape[1], generator=made) * 0.3
        return lk.Factors(A, torch.randn(update.B.shape[0], rank, generator=made) * 0.3, float(rank))

    config = like.config.replace(rank=rank, alpha=float(rank))
    return lk.Adapter(config, {m: pair(u) for m, u in like.factors.items()}, metadata=like.metadata)


async def passes(tiers: Tiers, *waiting: Awaitable[Result]) -> list[Result]:
    """Let the engine's passes go on until these are done."""
    every = asyncio.ensure_future(asyncio.gather(*waiting))
    while not every.done():
        tiers.between_steps()
        await asyncio.sleep(0.0005)
    found = every.result()
    tiers.between_steps()
    return found


async def until_ready(tiers: Tiers, keys: Sequence[str], tries: int = 4000) -> None:
    """Ask for adapters in each pass, as a waiting request does."""
    for _ in range(tries):
        tiers.between_steps()
        if tiers.ready(keys):
            return
        await asyncio.sleep(0.0005)
    raise AssertionError(f"{keys} did not come")


def routed(model: nn.Module, rows: Sequence[str | dict[str, float] | None]) -> Tensor:
    """The logits of a batch whose rows use these adapters."""
    with torch.inference_mode(), lk.route(model, list(rows)):
        return model(input_ids=IDS[: len(rows)]).logits


def alone(make: Callable[[], nn.Module], adapter: lk.Adapter | None, row: int) -> Tensor:
    """The logits of one row with one adapter on a model of its own."""
    model = make() if adapter is None else lk.attach(make(), adapter)
    with torch.inference_mode():
        return model(input_ids=IDS[row : row + 1]).logits[0]


def run(coroutine):
    """Run to the end, within a minute."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))
