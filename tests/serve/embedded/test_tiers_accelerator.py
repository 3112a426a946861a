"""Adapters that go between an accelerator's memory and ours. There is no accelerator here: the moves are between equal
devices, but in their order and threads, and a `Prepared` says that it is on one until it was parked.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
import tiny
import torch
from tier_sources import Given, alone, of_rank, passes, routed, run, until_ready

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.model.prepared import Prepared
from lorakit.serve.embedded.tiers import Tiers


@pytest.fixture
def moves(monkeypatch):
    """The moves, each (key, thread)."""
    seen: list[tuple[str, threading.Thread]] = []
    real = Prepared._move

    def move(self, devices):
        seen.append((self.name, threading.current_thread()))
        real(self, devices)

    monkeypatch.setattr(Prepared, "on_accelerator", property(lambda self: not self.parked))
    monkeypatch.setattr(Prepared, "_move", move)
    return seen


async def until(tiers, condition):
    for _ in range(4000):
        tiers.between_steps()
        if condition():
            return
        await asyncio.sleep(0.0005)
    raise AssertionError("it did not come to that")


def on_accelerator(tiers):
    return [key for key, entry in tiers._shelves.built.items() if not entry.prepared.parked]


def test_what_leaves_an_accelerator_is_moved_to_memory_and_back(model, first, moves):
    tiers, sources = Tiers(model, device=1), {key: Given(of_rank(2, n, first)) for n, key in enumerate("ab")}

    async def go():
        for key, source in sources.items():
            await passes(tiers, tiers.load(key, source))
        for key in "bab":
            await until_ready(tiers, key)
            torch.testing.assert_close(
                routed(model, [key])[0], alone(tiny.llama, sources[key].adapter, 0), atol=1e-5, rtol=1e-5
            )
        await until(tiers, lambda: not on_accelerator(tiers))

    run(go())
    names = [name for name, _ in moves]
    assert names[0] == "b"  # there was no place for it
    assert 6 <= len(names) <= 7  # b back, a out and back, b out and back, a out
    assert threading.main_thread() not in [thread for _, thread in moves]
    assert [source.reads for source in sources.values()] == [1, 1]


def test_one_that_is_unloaded_is_gone_and_can_be_loaded_again(model, first, moves):
    tiers = Tiers(model, device=2)

    async def go():
        await passes(tiers, tiers.load("b", Given(of_rank(2, 5, first))))
        for _ in range(3):
            await passes(tiers, tiers.load("a", Given(first)))
            await until_ready(tiers, "a")
            (freed,) = await passes(tiers, tiers.unload("a"))
            assert freed > 0
            await asyncio.sleep(0.01)  # whatever was begun arrives
            tiers.between_steps()
            assert lk.adapters(model) == ["b"]
        assert tiers.stats().in_memory == 0

    run(go())
    assert not moves, "nothing need be moved that is to be forgotten"
    torch.testing.assert_close(routed(model, ["b", None])[1], alone(tiny.llama, None, 1), atol=1e-5, rtol=1e-5)
    tiers.close()
    assert tiny.same_bits(tiny.bits(model), tiny.bits(tiny.llama()))


def test_what_gets_no_place_is_not_left_in_an_accelerators_memory(model, first, moves):
    tiers = Tiers(model, device=1)

    async def go():
        for n in range(6):
            await passes(tiers, tiers.load(f"k{n}", Given(of_rank(2, n, first))))
        await until(tiers, lambda: not on_accelerator(tiers))
        assert tiers.stats().in_memory == 5
        tiers.ready(["k3"])  # whoever asked for it hangs up while it is fetched
        await until(tiers, lambda: any(name == "k3" for name, _ in moves[5:]))
        await until(tiers, lambda: not on_accelerator(tiers))
        assert [name for name, _ in moves[5:]] in (["k3", "k3"], ["k3", "k0"])

    run(go())


def test_a_slow_disk_holds_up_no_move(model, first, moves):
    tiers, answers = Tiers(model, device=1), threading.Event()

    class Hanging(Given):
        def read(self):
            assert answers.wait(30)
            return super().read()

    async def go():
        for seed, key in enumerate("ab"):
            await passes(tiers, tiers.load(key, Given(of_rank(2, seed, first))))
        slow = [asyncio.ensure_future(tiers.load(f"slow{n}", Hanging(of_rank(2, n, first)))) for n in range(3)]
        await until_ready(tiers, "b")  # fetched
        await until(tiers, lambda: not on_accelerator(tiers))
        assert (await passes(tiers, tiers.unload("a")))[0] > 0
        assert not any(each.done() for each in slow)
        answers.set()
        await passes(tiers, *slow)

    try:
        run(go())
    finally:
        answers.set()


def test_a_move_that_fails_is_an_error_by_name_and_the_adapter_is_read_again(model, first, moves, monkeypatch):
    tiers, sources = (
        Tiers(model, device=1),
        {key: Given(of_rank(2, n, first), f"tenant-{key}") for n, key in enumerate("ab")},
    )

    def full(self, devices):
        raise torch.OutOfMemoryError("the accelerator is full")

    async def go():
        for key, source in sources.items():
            await passes(tiers, tiers.load(key, source))
        await until(tiers, lambda: not on_accelerator(tiers))
        with monkeypatch.context() as patched:
            patched.setattr(Prepared, "_move", full)
            with pytest.raises(AdapterError, match=r"adapter 'tenant-b' cannot be served: .*the accelerator is full"):
                await until_ready(tiers, "b")
        tiers.between_steps()
        tiers.between_steps()
        await until_ready(tiers, "b")

    run(go())
    assert sources["b"].reads == 2
