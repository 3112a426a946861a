"""The sides of `bench serve`: each answers a list of requests, greedily and without end tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import lorakit as lk

from ..generate.decode import pad_rows
from ..serve.embedded.engine import EmbeddedEngine
from ..serve.embedded.prefixes import Prefixes
from ..serve.embedded.tiers import Tiers
from ..serve.engine import Choice, Sampling, Work
from .train_step import PROJECTIONS


@dataclass(frozen=True)
class Asked:
    """A request: prompt ids, its adapters with weights (none: the base), and the number of new tokens."""

    ids: tuple[int, ...]
    choice: Choice
    new: int

    @property
    def adapter(self) -> str | None:
        """The name of its only adapter; None for the base."""
        return self.choice[0][0] if self.choice else None


class Side(Protocol):
    """Something that answers requests."""

    def answers(self, requests: Sequence[Asked]) -> list[tuple[int, ...]]:
        """Return the new ids of each request."""


@dataclass(frozen=True)
class Kept:
    """An adapter in memory, as an engine's source."""

    label: str
    adapter: lk.Adapter

    def read(self) -> lk.Adapter:
        return self.adapter


class Engine:
    """The embedded engine, with an event loop of its own. The prefix cache is off: every prompt is computed."""

    def __init__(self, engine: EmbeddedEngine, sources: Sequence[Kept]):
        self.engine, self.sources, self.loop = engine, sources, asyncio.new_event_loop()
        self.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        await self.engine.start()
        for source in self.sources:
            await self.engine.load(source.label, source)

    def answers(self, requests: Sequence[Asked]) -> list[tuple[int, ...]]:
        return self.loop.run_until_complete(self._answers(requests))

    def reload(self) -> None:
        """Unload all adapters and load them again."""
        self.loop.run_until_complete(self._reload())

    async def _answers(self, requests: Sequence[Asked]) -> list[tuple[int, ...]]:
        return await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request: Asked) -> tuple[int, ...]:
        work = Work(request.ids, request.choice, Sampling(max_tokens=request.new, temperature=0.0))
        return tuple([token async for piece in self.engine.submit(work) for token in piece.ids])

    async def _reload(self) -> None:
        for source in self.sources:
            await self.engine.unload(source.label)
        for source in self.sources:
            await self.engine.load(source.label, source)

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.stop(0))
        self.loop.close()


class Static:
    """transformers' `generate` on left-padded batches in turn. adapters: PEFT's `adapter_names` are used."""

    def __init__(self, model: Any, rows: int, adapters: bool = False):
        self.model, self.rows, self.adapters = model, rows, adapters

    def answers(self, requests: Sequence[Asked]) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for start in range(0, len(requests), self.rows):
            batch = requests[start : start + self.rows]
            ids, mask = pad_rows([request.ids for request in batch], 0, on_left=True)
            names = {"adapter_names": [request.adapter or "__base__" for request in batch]} if self.adapters else {}
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    max_new_tokens=max(request.new for request in batch),
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    **names,
                )
            new = output[:, ids.shape[1] :].tolist()
            found += [tuple(row[: request.new]) for row, request in zip(new, batch, strict=True)]
        return found


class Alone:
    """transformers' `generate` on one request after the other, with its adapters active."""

    def __init__(self, model: Any, adapters: Mapping[str, lk.Adapter]):
        self.model = model
        for name, adapter in adapters.items():
            lk.attach(model, adapter, name=name)
        self._static = Static(model, 1)

    def answers(self, requests: Sequence[Asked]) -> list[tuple[int, ...]]:
        found = []
        for request in requests:
            lk.activate(self.model, dict(request.choice) or None)
            found += self._static.answers([request])
        return found


def engine_for(model: Any, rows: int = 32, device: int = 32, memory_bytes: int = 2 << 30) -> EmbeddedEngine:
    """Return an engine that keeps no prefixes, so that every run computes every prompt. device, memory_bytes: see
    `Tiers`.
    """
    tiers = Tiers(model, device=device, memory_bytes=memory_bytes)
    return EmbeddedEngine(model, base="base", rows=rows, waiting=1024, tiers=tiers, prefixes=Prefixes(0))


def engine_side(model: Any, adapters: Mapping[str, lk.Adapter]) -> Engine:
    """Return the engine with these adapters loaded."""
    return Engine(engine_for(model), [Kept(name, adapter) for name, adapter in adapters.items()])


def static_side(model: Any, rows: int) -> Static:
    """Return transformers' `generate` on the base."""
    return Static(model, rows)


def peft_side(model: Any, adapters: Mapping[str, lk.Adapter], rows: int) -> Static:
    """Return PEFT with the same factors."""
    import peft

    theirs: Any = None
    for name, adapter in adapters.items():
        config = peft.LoraConfig(
            r=adapter.config.rank,
            lora_alpha=int(adapter.config.alpha),
            target_modules=PROJECTIONS,
            task_type="CAUSAL_LM",
        )
        if theirs is None:
            theirs = peft.get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            theirs.add_adapter(name, config, autocast_adapter_dtype=False)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, adapter in adapters.items():
            for module, factors in adapter.factors.items():
                for side in "AB":
                    parameters[f"base_model.model.{module}.lora_{side}.{name}.weight"].copy_(getattr(factors, side))
    return Static(theirs.eval(), rows, adapters=True)
