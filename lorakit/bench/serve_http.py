"""What HTTP costs, for `bench serve`: the engine behind the API and its guards, over the engine called directly.

The clients are in another process (`serve_client`), so that the processor time of this one is the server's alone: the
engine's thread, and the event loop that parses requests, writes streams and checks hosts and sizes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import lorakit as lk

from ..serve.engine import Sampling, Work
from ..serve.service import Service
from ..serve.settings import ServeSettings
from ..serve.start import start
from .measure import in_turn
from .serve_sides import Asked
from .suite import Row


def through_http(adapters: Mapping[str, lk.Adapter], requests: Sequence[Asked], at_once: int, rounds: int) -> Row:
    """Return a row: tokens per second of processor time through HTTP, over the engine called directly."""
    with tempfile.TemporaryDirectory() as folder:
        for name, adapter in adapters.items():
            adapter.save(Path(folder) / name)
        server = _Server({name: str(Path(folder) / name) for name in adapters})
        clients = _Clients(server.url, requests, at_once)
        try:
            counts: dict[str, int] = {}

            def direct() -> None:
                counts["direct"] = server.ask(requests, at_once)

            def http() -> None:
                counts["http"] = clients.ask()

            times = in_turn({"direct": direct, "http": http}, rounds, 1, time.process_time)
        finally:
            clients.close()
            server.close()
    if counts["http"] != counts["direct"]:
        raise RuntimeError(f"{counts['http']} tokens came through HTTP, and {counts['direct']} directly")
    return {
        "model": "256 x 6 (embedded)",
        "adapters": len(adapters),
        "streams": at_once,
        "HTTP over direct": round(times["direct"] / times["http"], 2),
    }


class _Server:
    """The server of `lorakit serve` on a free port, in a thread. No prefix cache, as every run shall compute all."""

    def __init__(self, adapters: Mapping[str, str]):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.loop = asyncio.new_event_loop()
        self.service: Service
        self._settings = ServeSettings(
            "embedded", "base", adapters, prefix_memory=0, precision="fp32", access_log=False
        )
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        self.loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        import uvicorn

        running = await start(self._settings, lambda service: setattr(self, "service", service))
        config = uvicorn.Config(running.app, log_level="warning", access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._ready.set()
        await self._server.serve(sockets=[self._socket])
        await running.stop(0)

    def ask(self, requests: Sequence[Asked], at_once: int) -> int:
        """Ask the engine itself, and return the number of new tokens."""
        return asyncio.run_coroutine_threadsafe(self._ask(requests, at_once), self.loop).result()

    async def _ask(self, requests: Sequence[Asked], at_once: int) -> int:
        places = asyncio.Semaphore(at_once)

        async def one(request: Asked) -> int:
            async with places, self.service.registry.lease(request.adapter or "base") as leased:
                work = Work(request.ids, leased.choice, Sampling(max_tokens=request.new, temperature=0.0))
                return sum([len(piece.ids) async for piece in self.service.engine.submit(work)])

        return sum(await asyncio.gather(*map(one, requests)))

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


class _Clients:
    """The process with the clients: a line in starts them, a line out has the number of tokens that they got."""

    def __init__(self, url: str, requests: Sequence[Asked], at_once: int):
        command = [sys.executable, "-m", f"{__package__}.serve_client"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        bodies = [
            {
                "model": request.adapter or "base",
                "prompt": list(request.ids),
                "max_tokens": request.new,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for request in requests
        ]
        self._line = json.dumps({"url": url, "at_once": at_once, "bodies": bodies})

    def ask(self) -> int:
        """Send all requests, and return the number of new tokens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(self._line + "\n")
        self._process.stdin.flush()
        answered = self._process.stdout.readline()
        if not answered:
            raise RuntimeError("the clients' process ended; its message is above")
        return int(answered)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
