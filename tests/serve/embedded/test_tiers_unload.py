"""Adapters that are unloaded from the tiers: when they go, and what is left of them."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
import tiny
from tier_sources import Given, of_rank, passes, routed, run

import lorakit as lk
from lorakit.serve.embedded.tiers import Tiers
from lorakit.serve.errors import UnknownAdapter


def test_unload_waits_for_its_requests_refuses_new_ones_and_frees(model, first):
    tiers = Tiers(model, device=2)

    async def go():
        await passes(tiers, tiers.load("a", Given(first)))
        tiers.claim("a")
        unloading = asyncio.ensure_future(tiers.unload("a"))
        for _ in range(10):
            tiers.between_steps()
            await asyncio.sleep(0.001)
        assert not unloading.done()
        with pytest.raises(UnknownAdapter, match="is being unloaded"):
            tiers.claim("a")
        assert tiers.ready("a"), "the request that holds it still gets it"
        tiers.use("a")
        tiers.release("a")
        tiers.between_steps()
        await asyncio.sleep(0.01)
        assert not unloading.done()
        tiers.done("a")
        (freed,) = await passes(tiers, unloading)
        assert freed == sum(t.numel() * t.element_size() for u in first.updates.values() for t in u.tensors().values())
        with pytest.raises(UnknownAdapter):
            tiers.ready("a")
        with pytest.raises(UnknownAdapter):
            await tiers.unload("a")

    run(go())
    assert lk.adapters(model) == []
    assert tiny.same_bits(tiny.bits(model), tiny.bits(tiny.llama()))


def test_one_that_is_unloaded_before_it_was_ever_attached_is_gone(model, first):
    tiers = Tiers(model, device=2)

    async def go():
        await passes(tiers, tiers.load("stays", Given(of_rank(2, 1, first))))
        loading = asyncio.ensure_future(tiers.load("a", Given(first)))
        while not loading.done():  # beside others it is built aside, and loaded before the next pass
            await asyncio.sleep(0.001)
        (freed,) = await passes(tiers, tiers.unload("a"))
        assert freed > 0
        assert tiers.stats().on_device == 1
        assert tiers.stats().in_memory == 0

    run(go())
    assert lk.adapters(model) == ["stays"]


def test_one_that_is_loaded_again_while_it_is_being_unloaded_stays(model, first):
    tiers = Tiers(model, device=2)

    async def go():
        await passes(tiers, tiers.load("a", Given(first)))
        tiers.claim("a")
        unloading = asyncio.ensure_future(tiers.unload("a"))
        await asyncio.sleep(0)
        await passes(tiers, tiers.load("a", Given(first)))
        assert await unloading == 0
        tiers.claim("a")
        tiers.release("a")
        tiers.release("a")
        tiers.between_steps()
        assert tiers.ready("a")

    run(go())


def test_a_hundred_loads_and_unloads_leave_nothing_alive(model, first):
    tiers, alive = Tiers(model, device=2, memory_bytes=1 << 20), []

    class Fresh(Given):
        def read(self):
            adapter = of_rank(2, self.reads, first)
            alive.extend(weakref.ref(update) for update in adapter.updates.values())
            alive.extend(weakref.ref(t) for update in adapter.updates.values() for t in update.tensors().values())
            return adapter

    async def go():
        await passes(tiers, tiers.load("stays", Given(first)))
        for n in range(100):
            key = f"k{n}"
            await passes(tiers, tiers.load(key, Fresh(first)))
            alive.append(weakref.ref(model.model.layers[0].self_attn.q_proj._modules[f"lora_{key}"]))
            alive.extend(map(weakref.ref, model.model.layers[1].mlp.down_proj._modules[f"lora_{key}"].parameters()))
            routed(model, [key, "stays", None])
            await passes(tiers, tiers.unload(key))

    gc.collect()
    gc.disable()  # references are counted: nothing waits for a collection, which would stop the steps
    try:
        run(go())
        left = sum(ref() is not None for ref in alive)
    finally:
        gc.enable()
    assert len(alive) > 1000
    assert not left
    assert lk.adapters(model) == ["stays"]


def test_many_that_are_unloaded_leave_over_several_passes(model, first, monkeypatch):
    monkeypatch.setattr("lorakit.serve.embedded.tiers.BUDGET", 0.0)
    tiers, gone, woken = Tiers(model, device=5), [], []
    tiers.has_gone, tiers.wake = gone.append, lambda: woken.append(len(gone))

    async def go():
        for seed, key in enumerate("abcde"):
            await passes(tiers, tiers.load(key, Given(of_rank(2, seed, first))))
        unloading = [asyncio.ensure_future(tiers.unload(key)) for key in "abcd"]
        await asyncio.sleep(0)
        unloading[2].cancel()  # whoever unloads may hang up: it goes on
        for left in (4, 3, 2, 1):
            woken.clear()
            tiers.between_steps()
            assert len(lk.adapters(model)) == left
            assert bool(woken) == (left > 1), "the next pass comes at once"
        freed = await asyncio.gather(*unloading, return_exceptions=True)
        assert [isinstance(each, int) and each > 0 for each in freed] == [True, True, False, True]

    run(go())
    assert gone == list("abcd")
