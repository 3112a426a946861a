"""vLLM as long as it is needed: started, ready, watched, and started again after a crash.

Started again at most `RESTARTS` times in `WITHIN` seconds, with another key, and given all adapters once more. Requests
that were running fail, and can be asked again; so do those that come while it starts. After more crashes than that the
engine stays down and says why: then the fault is not chance. A supervisor (systemd) can tell by /health.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable

from ...errors import LorakitError
from ..errors import EngineFailed
from .argv import VllmSettings, command_line, environment
from .http import VllmClient
from .process import Process, launch

log = logging.getLogger("lorakit.vllm")
RESTARTS, WITHIN = 3, 600.0
PAUSE = 2.0  # seconds before it is started again: the GPU's memory is free a moment after its last process ended
READY_SECONDS = 1_800.0  # a large model on a slow disk, and CUDA graphs


class Child:
    """A vLLM that is kept running. `client` calls the present one; raises EngineFailed while there is none."""

    def __init__(self, settings: VllmSettings, on_restart: Callable[[VllmClient], Awaitable[None]]):
        """on_restart: called with a new vLLM before requests reach it, to load the adapters again."""
        self.settings = settings
        self._on_restart = on_restart
        self._process: Process | None = None
        self._client: VllmClient | None = None
        self._down = ("vLLM has not been started", True)  # why there is no client, and whether it heals
        self._watcher: asyncio.Task[None] | None = None
        self._crashes: deque[float] = deque(maxlen=RESTARTS)
        self._folder: str | None = None  # of its sockets
        self._starts = 0

    @property
    def client(self) -> VllmClient:
        if self._client is None:
            raise EngineFailed(*self._down)
        return self._client

    @property
    def alive(self) -> bool:
        return self._client is not None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self, seconds: float = READY_SECONDS) -> None:
        """Start vLLM and wait until it is ready. Raises LorakitError with the end of its log if it does not come up."""
        self._client = await self._begin(seconds)
        self._watcher = asyncio.create_task(self._watch(seconds))

    async def stop(self) -> None:
        """End it. Nothing is started again."""
        self._down = ("the server is stopping", True)
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
        if self._process is not None:
            await self._process.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _begin(self, seconds: float, then: Callable[[VllmClient], Awaitable[None]] | None = None) -> VllmClient:
        """Start a vLLM, wait until it is ready and `then` is done, and return a client for it.

        Raises LorakitError; then nothing is left of it.
        """
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="lorakit-vllm-")  # only this user may enter it
        self._starts += 1
        key, socket = secrets.token_hex(32), os.path.join(self._folder, str(self._starts))
        self._process = process = await launch(command_line(self.settings, socket), environment(key, os.environ))
        log.info("vLLM is process %d: %s", process.pid, process.command())
        client = VllmClient(socket, key)
        try:
            await self._ready(process, client, seconds)
            if then is not None:
                await then(client)
        except BaseException:
            await client.aclose()
            await process.stop()
            raise
        return client

    async def _ready(self, process: Process, client: VllmClient, seconds: float) -> None:
        """Wait until /health answers. Raises EngineFailed if the child ends before, or takes too long."""
        deadline, pause = time.monotonic() + seconds, 0.05
        exited = asyncio.create_task(process.exited())
        try:
            while not await client.healthy(min(5.0, max(deadline - time.monotonic(), 0.1))):
                if exited.done():
                    raise EngineFailed(
                        f"vLLM ended with exit code {exited.result()} before it was ready\n{process.tail()}\n"
                        f"  it was started by: {process.command()}",
                        heals=False,
                    )
                if time.monotonic() >= deadline:
                    raise EngineFailed(
                        f"vLLM was not ready after {seconds:.0f} s\n{process.tail()}\n"
                        f"  it was started by: {process.command()}",
                        heals=False,
                    )
                await asyncio.wait([exited], timeout=pause)
                pause = min(pause * 1.5, 1.0)
        finally:
            exited.cancel()

    async def _watch(self, seconds: float) -> None:
        """Start vLLM again whenever it ends."""
        while True:
            assert self._process is not None
            code = await self._process.exited()
            tail = self._process.tail()
            client, self._client = self._client, None
            # Clients read this: the log's end and paths are for our own log.
            self._down = (f"vLLM ended (exit code {code}) and is being started again", True)
            log.error("vLLM ended with exit code %s\n%s", code, tail)
            if client is not None:
                await client.aclose()
            if not await self._again(seconds):
                return

    async def _again(self, seconds: float) -> bool:
        """Start vLLM once more, several times if need be. Returns False if that is given up."""
        while True:
            now = time.monotonic()
            if len(self._crashes) == RESTARTS and now - self._crashes[0] < WITHIN:
                why = f"vLLM ended {RESTARTS + 1} times within {WITHIN:.0f} s and is not started again"
                self._down = (why, False)
                log.error("%s", why)
                return False
            self._crashes.append(now)
            await asyncio.sleep(PAUSE)
            try:
                client = await self._begin(seconds, self._on_restart)
            except LorakitError as error:
                log.error("vLLM could not be started again: %s", error)
                continue
            self._client = client
            return True
