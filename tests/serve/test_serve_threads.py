"""Threads that are waited for, but by nobody for ever."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lorakit.serve.threads import in_thread


def test_what_the_function_returns_or_raises_comes_out():
    async def scenario():
        assert await in_thread(lambda: threading.current_thread().name, "named") == "named"
        assert await in_thread(lambda: threading.current_thread().daemon, "named")
        with pytest.raises(KeyError):
            await in_thread(lambda: {}["x"], "named")

    asyncio.run(scenario())


def test_an_exit_in_the_thread_is_heard_of():
    with pytest.raises(SystemExit, match="7"):
        asyncio.run(in_thread(lambda: (_ for _ in ()).throw(SystemExit(7)), "named"))


def test_who_stops_waiting_leaves_the_thread_alone(caplog):
    """It goes on, and its result, for which there is no loop any more, is no error."""
    release, ended = threading.Event(), threading.Event()

    def work() -> None:
        release.wait(30)
        ended.set()

    async def scenario():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_thread(work, "named"), 0.01)
        waiting = asyncio.create_task(in_thread(work, "named"))
        await asyncio.sleep(0.01)
        assert not waiting.done()

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 10
    release.set()
    assert ended.wait(10)
    time.sleep(0.05)
    assert not caplog.records
