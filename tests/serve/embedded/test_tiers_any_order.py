"""Loads, unloads, pins and requests in random order and at once, while a thread runs the engine's passes."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
import tiny
from tier_sources import Given, made, of_rank

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.model.prepared import Prepared
from lorakit.serve.embedded.tiers import Tiers
from lorakit.serve.errors import Cannot, UnknownAdapter

KEYS = [f"k{n}" for n in range(8)]


class Engine(threading.Thread):
    """What the engine's thread does with tiers: requests wait, run for some passes, and are over."""

    def __init__(self, tiers: Tiers):
        super().__init__(daemon=True)
        self.tiers, self.waiting, self.running = tiers, [], []
        self.served = self.failed = 0
        self.stop = False
        self.error: BaseException | None = None

    def run(self):
        try:
            while not self.stop or self.waiting or self.running:
                self.tiers.between_steps()
                for request in list(self.running):
                    request[1] -= 1
                    if request[1] == 0:
                        self.running.remove(request)
                        self.tiers.done(request[0])
                        self.tiers.release(request[0])
                        self.served += 1
                for keys, passes in list(self.waiting):
                    try:
                        if not self.tiers.ready(keys):
                            continue
                    except (AdapterError, Cannot):
                        self.failed += 1
                        self.tiers.release(keys)
                        self.waiting.remove((keys, passes))
                        continue
                    self.waiting.remove((keys, passes))
                    self.tiers.use(keys)
                    self.running.append([keys, passes])
                    assert all(key in lk.adapters(self.tiers._shelves.model) for key in keys)
                attached = lk.adapters(self.tiers._shelves.model)
                assert len(attached) <= 3
                assert all(key in attached for keys, _ in self.running for key in keys)
        except BaseException as error:
            self.error = error
            self.tiers.abandon(error)


@pytest.mark.parametrize(("seed", "accelerator"), [(0, False), (1, False), (2, False), (3, True)])
def test_no_order_of_calls_breaks_it(seed, accelerator, monkeypatch):
    """With an accelerator what is not attached is parked; there is none here, so between equal devices."""
    if accelerator:
        monkeypatch.setattr(Prepared, "on_accelerator", property(lambda self: not self.parked))
    first, chance = made(tiny.llama, targets=["q_proj"]), random.Random(seed)
    model = tiny.llama()
    tiers = Tiers(model, device=3, memory_bytes=3000)
    sources = {key: Given(of_rank(1 + n % 3, n, first), key) for n, key in enumerate(KEYS)}
    engine = Engine(tiers)

    async def calls():
        for _ in range(120):
            key = chance.choice(KEYS)
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.003]))
            what = chance.random()
            sources[key].error = OSError("gone") if chance.random() < 0.05 else None
            try:
                if what < 0.35:
                    await tiers.load(key, sources[key], pin=chance.random() < 0.2)
                elif what < 0.5:
                    await tiers.unload(key)
                else:
                    keys = tuple(chance.sample(KEYS, chance.choice([1, 1, 2])))
                    tiers.claim(keys)
                    engine.waiting.append((keys, chance.randint(1, 20)))
            except (AdapterError, UnknownAdapter, Cannot):
                pass

    async def go():
        await asyncio.gather(*(calls() for _ in range(4)))
        engine.stop = True

    engine.start()
    asyncio.run(asyncio.wait_for(go(), 60))
    engine.join(30)
    assert engine.error is None, repr(engine.error)
    assert not engine.is_alive()
    assert engine.served > 20
    tiers.close()
    assert tiny.same_bits(tiny.bits(model), tiny.bits(tiny.llama()))
