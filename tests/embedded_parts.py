"""Parts of the embedded engine for its tests: tiers of a few lines, and adapters to be served."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter, deque
from dataclasses import dataclass

import tiny
import torch

import lorakit as lk
from lorakit.serve.embedded.engine import EmbeddedEngine
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.engine import Sampling, Work
from lorakit.serve.errors import UnknownAdapter

IDS = (5, 9, 11)  # a prompt


@dataclass
class Held:
    """A source of an adapter that is in memory."""

    adapter: lk.Adapter
    label: str = "held"

    def read(self):
        return self.adapter


@dataclass
class Counts:
    on_device: int = 0
    in_memory: int = 0
    memory_bytes: int = 0
    loads: int = 0
    evictions: int = 0


class PlainTiers:
    """Attaches what is loaded, and keeps it.

    held: claims and uses by key that were not given back. blocked: keys that are not ready.
    """

    def __init__(self, model):
        self.model, self.wake, self.has_gone = model, lambda: None, lambda key: None
        self.known: set[str] = set()
        self.claims: Counter[str] = Counter()
        self.uses: Counter[str] = Counter()
        self.blocked: set[str] = set()
        self.jobs: deque = deque()

    async def load(self, key, source, *, pin=False):
        def attach():
            if key not in self.known:
                lk.attach(self.model, source.read(), name=key)
                self.known.add(key)

        await self._do(attach)

    async def unload(self, key):
        self.known.discard(key)
        while self.claims[key] or self.uses[key]:
            await asyncio.sleep(0.005)

        def detach():
            lk.detach(self.model, key)
            self.has_gone(key)

        await self._do(detach)
        return 1

    async def _do(self, job):
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def run():
            job()
            loop.call_soon_threadsafe(done.set)

        self.jobs.append(run)
        self.wake()
        await done.wait()

    def claim(self, keys):
        for key in keys:
            if key not in self.known:
                raise UnknownAdapter(f"no adapter {key}")
        self.claims.update(keys)

    def release(self, keys):
        self.claims.subtract(keys)

    def between_steps(self):
        while self.jobs:
            self.jobs.popleft()()

    def ready(self, keys):
        return not self.blocked & set(keys)

    def use(self, keys):
        self.uses.update(keys)

    def done(self, keys):
        self.uses.subtract(keys)

    def stats(self):
        return Counts(on_device=len(self.known))

    def abandon(self, error):
        self.abandoned = error

    def close(self):
        self.closed = True

    @property
    def held(self):
        return +self.claims + +self.uses


def adapters_for(model, number, rank=4, size=0.3, **settings):
    """Adapters with random factors, of ranks that differ, for a model: key -> Adapter."""
    made = {}
    for n in range(number):
        config = lk.LoraConfig(rank=rank + n % 3, targets="all-linear", **settings)
        one = copy.deepcopy(model)
        lk.attach(one, config)
        tiny.randomise_factors(one, seed=n + 1, size=size)
        made[f"key{n}"] = lk.capture(one)
    return made


def engine_for(model, prefixes=None, **settings):
    return EmbeddedEngine(
        model,
        base="tiny",
        tiers=settings.pop("tiers", None) or PlainTiers(model),
        prefixes=Prefixes(1 << 26) if prefixes is None else prefixes,
        **settings,
    )


async def answer(engine, ids, choice=(), tokens=12, **sampling):
    """Submit and read all: (ids, finish, cached tokens of the prompt)."""
    ticket = engine.submit(Work(tuple(ids), choice, Sampling(tokens, **{"temperature": 0.0, **sampling})))
    return await read(ticket)


async def read(ticket):
    got, finish, cached = [], None, 0
    async for piece in ticket:
        got.extend(piece.ids)
        finish, cached = piece.finish, cached or piece.cached
    return got, finish, cached


def greedy_work(ids=IDS, choice=(), tokens=12, deadline=None, **sampling):
    return Work(tuple(ids), choice, Sampling(tokens, **{"temperature": 0.0, **sampling}), deadline)


def run_engine(scenario, model=None, adapters=None, **settings):
    """Run `scenario(engine)` on a started engine, and check that nothing is held in the end."""

    async def all_of_it():
        engine = engine_for(tiny.llama() if model is None else model, **settings)
        await engine.start()
        for key, adapter in (adapters or {}).items():
            await engine.load(key, Held(adapter))
        result = await scenario(engine)
        await engine.stop(5)
        assert not engine.tiers.held
        return result

    return asyncio.run(asyncio.wait_for(all_of_it(), 60))


def alone(model, adapters, ids, choice=(), tokens=12):
    """What transformers' `generate` answers, greedy, with these adapters alone on a copy of the base."""
    return all_alone(model, adapters, [(ids, choice, tokens)])[0]


def all_alone(model, adapters, jobs):
    """The same for each of (prompt, choice, new tokens); the copies are shared by jobs of the same choice."""
    copies = {}
    for _, choice, _ in jobs:
        if choice not in copies:
            copies[choice] = one = copy.deepcopy(model)
            for key, _ in choice:
                lk.attach(one, adapters[key], name=key)
            if choice:
                lk.activate(one, dict(choice))
    return [_generated(copies[choice], ids, tokens) for ids, choice, tokens in jobs]


def _generated(one, ids, tokens):
    with torch.no_grad():
        out = one.generate(
            torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()
