"""Threads for what may never come back: a download, a file on a network disk, a step of the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[[], T], name: str) -> T:
    """Run a function in a daemon thread of its own, called `name`, and return what it returns.

    Not `asyncio.to_thread`: its few threads are everybody's, so that some hanging downloads would stop all other work,
    and they are joined when the loop is closed, so that a process could not be stopped while one hangs. Cancelling the
    wait leaves the thread alone.
    """
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # so that whoever stops waiting cannot cancel it, and its result has a place

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # SystemExit too: whoever waits must hear of it
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(done)
