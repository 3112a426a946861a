"""Folders with small adapters for tests of the server, and an engine with nothing behind it."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import torch
from scripted_engine import ScriptedEngine

import lorakit as lk
from lorakit.serve.engine import Facts
from lorakit.serve.guard.hub import Hub
from lorakit.serve.guard.roots import Roots
from lorakit.serve.registry import Registry


def value(seed: int = 0, rank: int = 2) -> lk.Adapter:
    made = torch.Generator().manual_seed(seed)
    name = "model.layers.0.self_attn.q_proj"
    factors = lk.Factors(torch.randn(rank, 16, generator=made), torch.randn(16, rank, generator=made), 2.0 * rank)
    return lk.Adapter(lk.LoraConfig(rank=rank, alpha=2 * rank, targets=["q_proj"]), {name: factors})


def write(folder: Path, seed: int = 0, **metadata) -> Path:
    """A PEFT folder, with `lorakit.json` saying the metadata."""
    made = value(seed)
    lk.Adapter(made.config, made.updates, metadata=metadata).save(folder)
    return folder


class Held(ScriptedEngine):
    """Notes each load and unload; `gate`, if set, is waited for before a load; `refuse`: keys' label -> an error."""

    def __init__(self):
        super().__init__(lambda work: [1, 2, 3])
        self.calls: list[tuple[str, str]] = []
        self.gate: asyncio.Event | None = None
        self.refuse: Exception | None = None

    async def load(self, key, source, *, pin=False):
        self.calls.append(("load", source.label))
        if self.gate is not None:
            await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        await super().load(key, source, pin=pin)

    async def unload(self, key):
        self.calls.append(("unload", self.loaded[key].label if key in self.loaded else "?"))
        await super().unload(key)
        return 1000


def adapters_alive() -> dict[int, lk.Adapter]:
    """All adapters that this process holds, by id: fixtures of other tests have some too."""
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if isinstance(thing, lk.Adapter)}


async def settled(made: Registry) -> None:
    """Wait for what goes on in the background."""
    await asyncio.gather(*made._tasks, return_exceptions=True)
    await made.versions.close()


def names(made: Registry) -> list[str]:
    return [card.name for card in made.cards()]


def registry(engine, *roots: Path, can: frozenset | None = None, hub: Hub | None = None, **options) -> Registry:
    facts = engine.facts if can is None else Facts("base", 512, 4096, can)
    return Registry(engine, facts, base_names=["base", "org/base"], roots=Roots(roots), hub=hub, **options)
