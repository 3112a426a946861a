"""A server process for tests of how it starts and stops: `python served.py PORT DRAIN`.

GET /slow sends a part each 50 ms until the engine is stopped, then the last one; /stuck never ends; others answer "ok".
"""

from __future__ import annotations

import asyncio
import sys
import time

from lorakit.errors import StoppedError
from lorakit.serve import logs
from lorakit.serve.guard.guarded import GuardSettings, guarded
from lorakit.serve.server import Running, listen, serve, url_of


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
        await send({"type": "http.response.body", "body": b"ok"})

    return app


async def start(drain_of: list[float], slow: bool) -> Running:
    if slow:
        print("starting", flush=True)
        await asyncio.sleep(600)
    stopping = asyncio.Event()

    async def stop(drain: float) -> None:
        """As an engine does: running answers get `drain` seconds, then they end."""
        drain_of.append(drain)
        await asyncio.sleep(drain)
        stopping.set()

    return Running(guarded(application(stopping), GuardSettings(), logs.report), stop)


def main(port: str, drain: str, slow: str = "") -> None:
    logs.configure(access=False)
    listener = listen("127.0.0.1", int(port))
    drain_of: list[float] = []
    began = time.monotonic()
    try:
        ready = lambda: print(url_of(listener), flush=True)  # noqa: E731
        asyncio.run(serve(listener, lambda: start(drain_of, bool(slow)), drain=float(drain), ready=ready))
    except StoppedError as error:
        print(f"{error.signal} {drain_of} {time.monotonic() - began:.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
