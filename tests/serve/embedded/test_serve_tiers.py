"""Adapters that come and go between the steps of a batch: places, memory, disk, pins, unloading."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
import tiny
import torch
from tier_sources import Given, alone, made, of_rank, passes, routed, run, until_ready

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.serve.embedded.tiers import Tiers
from lorakit.serve.errors import Cannot, EngineFailed, NoPlace


def test_a_loaded_adapter_is_on_the_device_and_a_row_that_uses_it_equals_it_alone(model, first):
    tiers = Tiers(model, device=2)

    async def go():
        await passes(tiers, tiers.load("a", Given(first)))

    run(go())
    assert (tiers.stats().on_device, tiers.stats().in_memory, tiers.stats().loads) == (1, 0, 1)
    assert tiers.ready(["a"])
    found = routed(model, ["a", None])
    torch.testing.assert_close(found[0], alone(tiny.llama, first, 0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], alone(tiny.llama, None, 1), atol=1e-5, rtol=1e-5)


def test_more_than_there_are_places_take_turns_and_the_least_recently_used_leaves(model, first):
    tiers, sources = Tiers(model, device=2), {key: Given(of_rank(2, seed, first)) for seed, key in enumerate("abc")}

    async def go():
        for key, source in sources.items():
            await passes(tiers, tiers.load(key, source))
        assert tiers.stats().on_device == 2
        assert tiers.stats().in_memory == 1
        tiers.use("b")
        tiers.done("b")
        tiers.use("a")
        tiers.done("a")
        await until_ready(tiers, "c")  # b was used before a

    run(go())
    assert tiers.ready("a")
    assert not tiers.ready("b")
    assert tiers.stats().evictions == 1
    assert all(source.reads == 1 for source in sources.values())  # from memory, not from disk
    found = routed(model, ["a", "c"])
    for row, key in enumerate("ac"):
        torch.testing.assert_close(found[row], alone(tiny.llama, sources[key].adapter, row), atol=1e-5, rtol=1e-5)


def test_one_in_use_is_never_evicted_and_the_next_to_leave_takes_no_new_rows(model, first):
    tiers = Tiers(model, device=1)

    async def go():
        for seed, key in enumerate("ab"):
            await passes(tiers, tiers.load(key, Given(of_rank(2, seed, first))))
        assert tiers.ready("a")
        tiers.use("a")
        for _ in range(20):
            assert not tiers.ready("b")
            tiers.between_steps()
            await asyncio.sleep(0.001)
        assert not tiers.ready("a"), "new rows of a would keep b out for ever"
        tiers.done("a")
        await until_ready(tiers, "b")
        tiers.use("b")
        tiers.done("b")
        await until_ready(tiers, "a")

    run(go())


def test_two_mixes_that_do_not_fit_together_do_not_take_each_others_places_for_ever(model, first):
    tiers = Tiers(model, device=3)

    async def go():
        for seed, key in enumerate("abcd"):
            await passes(tiers, tiers.load(key, Given(of_rank(2, seed, first))))
        done = []
        for _ in range(400):
            tiers.between_steps()
            for mix in (m for m in ("ab", "cd", "bc", "da") if m not in done):
                if tiers.ready(mix):
                    tiers.use(mix)
                    tiers.done(mix)
                    done.append(mix)
            await asyncio.sleep(0.0005)
        assert sorted(done) == ["ab", "bc", "cd", "da"]

    run(go())


def test_a_thousand_registered_with_few_places_and_a_pinned_one_that_never_reloads(model):
    """Traffic of 300 requests, skewed as 1 / rank; memory holds eight adapters besides the four on the device."""
    first = made(tiny.llama, targets=["q_proj"])
    size = sum(t.numel() * t.element_size() for u in first.updates.values() for t in u.tensors().values())
    tiers = Tiers(model, device=4, memory_bytes=8 * size)
    forty = [Given(of_rank(2, n, first), f"tenant-{n}") for n in range(40)]  # so that the test is quick
    pinned = Given(of_rank(2, 77, first), "pinned")
    keys = [f"k{n}" for n in range(1000)]
    shown = random.Random(5).choices(range(1000), weights=[1 / (n + 1) for n in range(1000)], k=300)

    async def go():
        await passes(tiers, tiers.load("k7", pinned, pin=True))
        await passes(tiers, *(tiers.load(key, forty[n % 40]) for n, key in enumerate(keys) if key != "k7"))
        for n in shown:
            await until_ready(tiers, [keys[n]])
            tiers.use([keys[n]])
            assert tiers.ready(["k7"])
            stats = tiers.stats()
            assert stats.on_device <= 4
            assert stats.memory_bytes <= 8 * size
            tiers.done([keys[n]])

    run(go())
    assert pinned.reads == 1
    assert tiers.stats().evictions > 100
    assert tiers.stats().loads < 300, "what is asked for again and again stays"
    found = routed(model, ["k7", None])
    torch.testing.assert_close(found[0], alone(tiny.llama, pinned.adapter, 0), atol=1e-5, rtol=1e-5)


def test_what_was_dropped_from_memory_is_read_again(model, first):
    tiers, sources = (
        Tiers(model, device=1, memory_bytes=0),
        {k: Given(of_rank(2, n, first)) for n, k in enumerate("ab")},
    )

    async def go():
        for key, source in sources.items():
            await passes(tiers, tiers.load(key, source))
        assert tiers.stats().in_memory == 0
        await until_ready(tiers, "b")
        await until_ready(tiers, "a")

    run(go())
    assert [source.reads for source in sources.values()] == [2, 2]
    torch.testing.assert_close(
        routed(model, ["a"])[0], alone(tiny.llama, sources["a"].adapter, 0), atol=1e-5, rtol=1e-5
    )


def test_a_file_that_cannot_be_read_any_more_is_an_error_by_name_and_is_tried_again(model, first):
    tiers, source = Tiers(model, device=1, memory_bytes=0), Given(first, "legal")

    async def go():
        await passes(tiers, tiers.load("a", source))
        await passes(tiers, tiers.load("b", Given(of_rank(2, 3, first))))
        await until_ready(tiers, "b")
        source.error = AdapterError("the file has changed")
        for _ in range(2):
            with pytest.raises(AdapterError, match="adapter 'legal' cannot be served: the file has changed") as one:
                await until_ready(tiers, "a")
            with pytest.raises(AdapterError) as other:
                tiers.ready("a")
            assert one.value is not other.value, "each raise would add its frames to one traceback"
            tiers.between_steps()
            tiers.between_steps()
            tiers.between_steps()
        source.error = None
        await until_ready(tiers, "a")

    run(go())


def test_loads_of_one_key_at_once_read_it_once(model, first):
    tiers, source = Tiers(model, device=2), Given(first)

    async def go():
        await passes(tiers, *(tiers.load("a", source) for _ in range(5)))

    run(go())
    assert source.reads == 1


def test_an_adapter_is_noted_as_loaded_before_the_engine_can_take_and_unload_it(model, first, monkeypatch):
    tiers = Tiers(model, device=2)
    loader, note = tiers._loader, tiers._loader._is_checked
    could_be_taken = []

    def noted(key):
        could_be_taken.append(loader.has_arrived)
        note(key)

    monkeypatch.setattr(loader, "_is_checked", noted)

    async def go():
        await passes(tiers, tiers.load("stays", Given(first)))  # on its layers others can be built beforehand
        for _ in range(3):
            await passes(tiers, tiers.load("a", Given(first)))
            await passes(tiers, tiers.unload("a"))

    run(go())
    assert could_be_taken == [False] * 3


def test_a_load_that_nobody_waits_for_any_more_does_not_fail_for_others(model, first):
    tiers, source = Tiers(model, device=2), Given(first)

    async def go():
        given_up = asyncio.ensure_future(tiers.load("a", source))
        await asyncio.sleep(0)
        given_up.cancel()
        await passes(tiers, tiers.load("a", source))
        assert given_up.cancelled()

    run(go())
    assert tiers.ready("a")
    assert source.reads == 1


def test_pins_take_places_and_the_last_one_is_refused_by_name(model, first):
    tiers = Tiers(model, device=2)

    async def go():
        for seed, key in enumerate("ab"):
            await passes(tiers, tiers.load(key, Given(of_rank(2, seed, first), f"tenant-{key}"), pin=key == "a"))
        tiers.claim(["a", "b"])
        tiers.release(["a", "b"])
        await passes(tiers, tiers.load("c", Given(of_rank(2, 5, first), "c")))
        with pytest.raises(Cannot, match="needs 2 adapters at once; the device has places for 1 beside 1 pinned"):
            tiers.claim(["b", "c"])
        await passes(tiers, tiers.load("b", Given(first), pin=True))
        with pytest.raises(NoPlace, match=r"'c' cannot be pinned: all 2 places .* by 'tenant-a', 'tenant-b'"):
            await tiers.load("c", Given(first, "c"), pin=True)
        with pytest.raises(Cannot, match="places for 0 beside 2 pinned"):
            tiers.claim(["c"])
        await passes(tiers, tiers.load("a", Given(first)))  # no pin any more
        await until_ready(tiers, ["c"])
        assert tiers.ready(["b"])
        with pytest.raises(Cannot) as refused:
            tiers.claim(["a", "c"])
        assert refused.value.what == "mix"

    run(go())


def test_who_waits_for_an_adapter_is_told_when_the_engine_ends(model, first):
    tiers = Tiers(model, device=2)

    async def go():
        await passes(tiers, tiers.load("a", Given(first)))
        tiers.claim("a")
        waiting = [asyncio.ensure_future(each) for each in (tiers.load("b", Given(first)), tiers.unload("a"))]
        await asyncio.sleep(0)
        tiers.close()
        for each in waiting:
            with pytest.raises(EngineFailed, match="the engine has stopped"):
                await each

    run(go())
    assert tiny.same_bits(tiny.bits(model), tiny.bits(tiny.llama()))


def test_closing_does_not_wait_for_a_file_that_does_not_answer(model, first):
    tiers, reading, answers = Tiers(model, device=2), threading.Event(), threading.Event()

    class Hanging(Given):
        def read(self):
            reading.set()
            answers.wait(30)
            return super().read()

    async def go():
        await passes(tiers, tiers.load("a", Given(first)))
        loading = [asyncio.ensure_future(tiers.load(key, Hanging(first))) for key in "bcd"]
        await asyncio.to_thread(reading.wait, 30)
        began = time.monotonic()
        tiers.close()
        assert time.monotonic() - began < 5
        for each in loading:
            with pytest.raises(EngineFailed, match="the engine has stopped"):
                await each
        answers.set()

    run(go())
    assert tiny.same_bits(tiny.bits(model), tiny.bits(tiny.llama()))


def test_what_runs_does_not_notice_others_that_come_and_go(model, first):
    """A thread computes steps all the time, as the engine's does; adapters of every fate come meanwhile."""
    tiers = Tiers(model, device=3)
    stop, differing, steps = threading.Event(), [], 0
    broken = of_rank(2, 99, first)
    broken.updates["model.layers.0.self_attn.q_proj"].A[0, 0] = float("nan")
    other = lk.Adapter(
        first.config, {"model.layers.0.self_attn.q_prot": first.factors["model.layers.0.self_attn.q_proj"]}
    )

    async def before():
        await passes(tiers, tiers.load("a", Given(first), pin=True))

    run(before())
    expected = routed(model, ["a", None])

    def steps_of_the_engine():
        nonlocal steps
        while not stop.is_set():
            tiers.between_steps()
            steps += 1
            if not torch.equal(routed(model, ["a", None]), expected):
                differing.append(steps)

    async def go():
        for n in range(30):
            await tiers.load(f"k{n}", Given(of_rank(1 + n % 4, n, first)))
            for bad in (broken, other):
                with pytest.raises(AdapterError):
                    await tiers.load(f"bad{n}", Given(bad))
            if n % 3 == 0:
                await tiers.unload(f"k{n}")

    engine = threading.Thread(target=steps_of_the_engine)
    engine.start()
    try:
        run(go())
    finally:
        stop.set()
        engine.join()
    assert steps > 30
    assert not differing
    assert tiers.stats().on_device + tiers.stats().in_memory == 21
    tiers.close()
    assert tiny.same_bits(tiny.bits(model), tiny.bits(tiny.llama()))
