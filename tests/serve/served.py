"""A server process for tests of how it starts and stops: `python served.py PORT DRAIN`.

GET /slow sends a part each 50 ms until the engine is stopped, then the last one; /stuck never ends; /thread waits for
one of asyncio's threads that hangs, while another does so in one of ours; others answer "ok".

`python served.py PORT DRAIN slow` takes long to start; with `hung` in place of it, in a thread that hangs.
"""

from __future__ import annotations

import asyncio
import sys
import time

from lorakit.errors import StoppedError
from lorakit.serve import logs
from lorakit.serve.guard.guarded import GuardSettings, guarded
from lorakit.serve.server import Running, listen, run, url_of
from lorakit.serve.threads import in_thread


def application(stopping: asyncio.Event):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        if scope["path"] == "/large":
            while not stopping.is_set():
                await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
        while scope["path"] == "/slow" and not stopping.is_set():
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            await asyncio.sleep(0.05)
        if scope["path"] == "/stuck":
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            await asyncio.sleep(600)
        if scope["path"] == "/thread":
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            ours = asyncio.create_task(in_thread(lambda: time.sleep(600), "hangs"))
            await asyncio.to_thread(time.sleep, 600)
            await ours
        await send({"type": "http.response.body", "body": b"ok"})

    return app


async def start(drain_of: list[float], how: str) -> Running:
    if how:
        print("starting", flush=True)
    if how == "slow":
        await asyncio.sleep(600)
    if how == "hung":
        await asyncio.shield(asyncio.create_task(asyncio.to_thread(time.sleep, 600)))
    stopping = asyncio.Event()

    async def stop(drain: float) -> None:
        """As an engine does: running answers get `drain` seconds, then they end."""
        drain_of.append(drain)
        await asyncio.sleep(drain)
        stopping.set()

    return Running(guarded(application(stopping), GuardSettings(), logs.report), stop)


def main(port: str, drain: str, how: str = "") -> None:
    logs.configure(access=False)
    listener = listen("127.0.0.1", int(port))
    drain_of: list[float] = []
    began = time.monotonic()

    def stopped(error: StoppedError) -> int:
        print(f"{error.signal} {drain_of} {time.monotonic() - began:.1f}")
        return 0

    ready = lambda: print(url_of(listener), flush=True)  # noqa: E731
    run(listener, lambda: start(drain_of, how), drain=float(drain), ready=ready, stopped=stopped)


if __name__ == "__main__":
    main(*sys.argv[1:])
