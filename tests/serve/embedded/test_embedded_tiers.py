"""The embedded engine with its real tiers: few places, many adapters, answers equal to each adapter alone."""

from __future__ import annotations

import asyncio

import pytest
import tiny
import torch
from tier_sources import Given, made, of_rank

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.serve.embedded.engine import EmbeddedEngine
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.embedded.tiers import Tiers
from lorakit.serve.engine import Sampling, Work
from lorakit.serve.errors import UnknownAdapter

PROMPTS = [(3, 14, 15, 9, 2), (6, 5, 35), (8, 9, 7, 9, 32, 38), (46, 2, 6)]


def engine_on(model, places: int, memory_bytes: int = 1 << 20, rows: int = 4) -> EmbeddedEngine:
    tiers = Tiers(model, device=places, memory_bytes=memory_bytes)
    return EmbeddedEngine(model, base="base", rows=rows, tiers=tiers, prefixes=Prefixes(1 << 20))


async def answer(engine: EmbeddedEngine, prompt: tuple[int, ...], choice, tokens: int = 6) -> list[int]:
    ticket = engine.submit(Work(prompt, choice, Sampling(max_tokens=tokens, temperature=0.0)))
    return [token for piece in [piece async for piece in ticket] for token in piece.ids]


def alone(adapters: dict[str, lk.Adapter], prompt: tuple[int, ...], choice, tokens: int = 6) -> list[int]:
    model = tiny.llama()
    for key, _ in choice:
        lk.attach(model, adapters[key], key, activate=False)
    if choice:
        lk.activate(model, dict(choice))
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return found[0, len(prompt) :].tolist()


def test_sixty_requests_for_a_dozen_adapters_and_mixes_with_three_places():
    first = made(tiny.llama, targets=["q_proj", "v_proj", "down_proj"])
    adapters = {f"k{n}": of_rank(1 + n % 3, n, first) for n in range(12)}
    model = tiny.llama()
    engine = engine_on(model, places=3, memory_bytes=20_000)
    choices = [(), *(((key, 1.0),) for key in adapters), (("k0", 0.7), ("k1", 0.3)), (("k5", 0.5), ("k2", -1.0))]

    async def go():
        await engine.start()
        for key, adapter in adapters.items():
            await engine.load(key, Given(adapter, key))
        works = [(PROMPTS[n % 4], choices[n * 7 % len(choices)]) for n in range(60)]
        found = await asyncio.gather(*(answer(engine, *work) for work in works))
        stats = engine.stats()
        assert stats.on_device <= 3
        assert stats.evictions > 5
        await engine.stop(5)
        return list(zip(works, found, strict=True))

    cache: dict = {}
    for work, found in asyncio.run(asyncio.wait_for(go(), 120)):
        if work not in cache:
            cache[work] = alone(adapters, *work)
        assert found == cache[work], work
    assert tiny.same_bits(tiny.bits(model), tiny.bits(tiny.llama()))


def test_unloading_waits_for_the_answer_and_a_refused_load_changes_nothing():
    first = made(tiny.llama)
    model = tiny.llama()
    engine = engine_on(model, places=2)

    async def go():
        await engine.start()
        await engine.load("a", Given(first))
        running = asyncio.ensure_future(answer(engine, PROMPTS[0], (("a", 1.0),), 20))
        await asyncio.sleep(0)
        with pytest.raises(AdapterError, match="adapter 'other' cannot be served"):
            await engine.load("b", Given(made(lambda: tiny.llama(tied=True)), "other"))
        freed = await engine.unload("a")
        assert running.done()
        assert freed > 0
        with pytest.raises(UnknownAdapter):
            engine.submit(Work(PROMPTS[0], (("a", 1.0),), Sampling(max_tokens=1)))
        await engine.stop(5)
        return await running

    assert asyncio.run(asyncio.wait_for(go(), 60)) == alone({"a": first}, PROMPTS[0], (("a", 1.0),), 20)
