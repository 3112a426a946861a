"""What every engine keeps when adapters come and go: what loading and unloading do to requests, also those that run."""

from __future__ import annotations

import asyncio

import engine_cases
import engine_running
import pytest
from engine_cases import ValueSource
from engine_running import GREEDY, LONG, ONE, PROMPT, A, answered, collected, ids_of

from lorakit.errors import AdapterError, LorakitError
from lorakit.serve.engine import Choice, Engine, Piece, Work
from lorakit.serve.errors import Cannot, UnknownAdapter
from lorakit.serve.ticket import Ticket

running, slow = engine_running.running, engine_running.slow


def test_unknown_adapters(running):
    async def submit(choice: Choice) -> Ticket:
        return running.engine.submit(Work(PROMPT, choice, GREEDY))

    for choice in ((("cc" * 32, 1.0),), ((A, 0.5), ("cc" * 32, 0.5))):
        with pytest.raises(UnknownAdapter):
            running.run(submit(choice))
    with pytest.raises(UnknownAdapter):
        running.run(running.engine.unload("cc" * 32))


def test_loading_again_reads_nothing(running):
    again = ValueSource("adapter-1", engine_cases.made(1))
    running.run(running.engine.load(A, again))
    assert again.reads == 0


def test_pins_are_kept_or_refused(running):
    source = ValueSource("pinned", engine_cases.made(9))
    if not running.case.pins:
        with pytest.raises(Cannot, match="pin"):
            running.run(running.engine.load("99" * 32, source, pin=True))
        return
    running.run(running.engine.load("99" * 32, source, pin=True))
    running.run(running.engine.load("99" * 32, source))
    assert source.reads == 1
    running.run(running.engine.unload("99" * 32))


def test_a_failed_load_changes_nothing(running, slow):
    alone = ids_of(running.answer(choice=ONE))
    broken = ValueSource("broken", engine_cases.made(3), fails="the file changed")

    async def scenario() -> list[Piece]:
        task = asyncio.create_task(answered(running.engine, Work(PROMPT, ONE, GREEDY)))
        with pytest.raises(AdapterError, match="the file changed"):
            await running.engine.load("dd" * 32, broken)
        with pytest.raises(UnknownAdapter):
            running.engine.submit(Work(PROMPT, (("dd" * 32, 1.0),), GREEDY))
        return await task

    assert ids_of(running.run(scenario())) == alone
    broken.fails = None
    running.run(running.engine.load("dd" * 32, broken))  # mended: loads
    assert running.run(running.engine.unload("dd" * 32)) > 0


@pytest.mark.parametrize("wrong", [{"ending": "o_pro"}, {"width": 100}])
def test_adapters_that_do_not_fit_are_refused_by_name(running, wrong):
    if not running.case.checks:
        pytest.skip("this engine has no base")
    with pytest.raises(LorakitError, match="o_pro"):
        running.run(running.engine.load("ee" * 32, ValueSource("wrong", engine_cases.made(4, **wrong))))


def test_loading_at_once_reads_once(running):
    source = ValueSource("adapter-5", engine_cases.made(5))

    async def scenario() -> None:
        await asyncio.gather(*(running.engine.load("55" * 32, source) for _ in range(3)))

    running.run(scenario())
    if running.case.checks:
        assert source.reads == 1
    running.run(running.engine.unload("55" * 32))


def test_unloading_waits_for_requests_and_refuses_new_ones(running, slow):
    key = "ff" * 32
    running.run(running.engine.load(key, ValueSource("leaving", engine_cases.made(6))))
    alone = ids_of(running.answer(choice=((key, 1.0),)))

    async def scenario() -> tuple[list[Piece], int]:
        ticket = running.engine.submit(Work(PROMPT, ((key, 1.0),), GREEDY))
        unloading = asyncio.create_task(running.engine.unload(key))  # at once: the request is accepted already
        await asyncio.sleep(0.05)
        with pytest.raises(UnknownAdapter):
            running.engine.submit(Work(PROMPT, ((key, 1.0),), GREEDY))
        pieces = await collected(ticket)
        return pieces, await asyncio.wait_for(unloading, 20)

    pieces, freed = running.run(scenario())
    assert ids_of(pieces) == alone
    assert freed > 0
    running.run(running.engine.load(key, ValueSource("back", engine_cases.made(6))))
    assert ids_of(running.answer(choice=((key, 1.0),))) == alone
    running.run(running.engine.unload(key))


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_unloading_waits_for_a_request_that_was_accepted_just_now(running, weight):
    key = "f0" * 32
    choice: Choice = ((key, weight),)
    running.run(running.engine.load(key, ValueSource("leaving", engine_cases.made(6))))
    alone = ids_of(running.answer(choice=choice))

    async def scenario() -> list[Piece]:
        ticket = running.engine.submit(Work(PROMPT, choice, GREEDY))
        async with asyncio.timeout(20):
            await running.engine.unload(key)  # no task of the engine's has run since
        return await collected(ticket)

    assert ids_of(running.run(scenario())) == alone


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_unloading_waits_for_a_request_that_hangs_up(running, slow, weight):
    key = "f1" * 32
    running.run(running.engine.load(key, ValueSource("leaving", engine_cases.made(6))))

    async def scenario() -> None:
        ticket = running.engine.submit(Work(PROMPT, ((key, weight),), LONG))
        unloading = asyncio.create_task(running.engine.unload(key))
        await asyncio.sleep(0.05)
        ticket.cancel()
        assert (await collected(ticket))[-1].finish == "cancelled"
        assert await asyncio.wait_for(unloading, 20) > 0

    running.run(scenario())
    with pytest.raises(UnknownAdapter):
        running.run(running.engine.unload(key))


def test_loading_takes_an_unload_back_that_still_waits(running, slow):
    key = "fb" * 32
    choice: Choice = ((key, 1.0),)
    running.run(running.engine.load(key, ValueSource("staying", engine_cases.made(6))))
    alone = ids_of(running.answer(choice=choice))

    async def scenario() -> list[Piece]:
        ticket = running.engine.submit(Work(PROMPT, choice, LONG))
        unloads = [asyncio.create_task(running.engine.unload(key)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(UnknownAdapter):
            running.engine.submit(Work(PROMPT, choice, GREEDY))
        again = ValueSource("staying", engine_cases.made(6))
        await running.engine.load(key, again)
        assert again.reads == 0
        assert await asyncio.wait_for(asyncio.gather(*unloads), 20) == [0, 0]
        pieces = await answered(running.engine, Work(PROMPT, choice, GREEDY))
        ticket.cancel()
        await collected(ticket)
        return pieces

    assert ids_of(running.run(scenario())) == alone
    assert running.run(running.engine.unload(key)) > 0


def test_an_unload_goes_on_if_who_asked_hangs_up(running, slow):
    key = "fc" * 32
    running.run(running.engine.load(key, ValueSource("leaving", engine_cases.made(6))))

    async def scenario() -> None:
        ticket = running.engine.submit(Work(PROMPT, ((key, 1.0),), LONG))
        unloading = asyncio.create_task(running.engine.unload(key))
        await asyncio.sleep(0.05)
        unloading.cancel()
        await asyncio.wait([unloading])
        with pytest.raises(UnknownAdapter):
            running.engine.submit(Work(PROMPT, ((key, 1.0),), GREEDY))
        ticket.cancel()
        await collected(ticket)
        await until_gone(running.engine, key)

    running.run(scenario())


async def until_gone(engine: Engine, key: str) -> None:
    """Wait until a key is not loaded any more."""
    async with asyncio.timeout(20):
        while True:
            try:
                await engine.unload(key)
            except UnknownAdapter:
                return
