"""The server's process: take the port, start, say that it is ready, and stop within a bound when it is asked to.

    listener = listen("127.0.0.1", 8000)            # first: a port that is taken is an error at once
    run(listener, start, drain=20, ready=print_it, stopped=say_so)       # ends the process

SIGTERM or SIGINT: no new connections, running answers get `drain` seconds, the rest is cancelled and ends with an
error. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, LorakitError, StoppedError
from .guard.asgi import App
from .logs import LOG

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AFTER_DRAIN = 3.0  # seconds for cancelled answers to be sent to their end, and for the engine to free what it holds
CONNECTIONS = 4_096  # open at once; more are answered with 503
UNREAD_SECONDS = 60  # a client that takes nothing for this long has its connection closed by the system
HEADER_BYTES = 65_536


@dataclass(frozen=True)
class Running:
    """A server that is ready: the application, and how its engine stops. stop: gets the seconds for running answers."""

    app: App
    stop: Callable[[float], Awaitable[None]]


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0: any free one. Connections are refused until `serve` is ready. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: there is no such address; expected 127.0.0.1, 0.0.0.0 or a name") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it lets two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1_000)
        listener.bind(address)
    except OSError as error:
        listener.close()
        fix = f"--port {port + 1 if 0 < port < 65_535 else 8000}, or --port 0 for any that is free"
        raise ConfigError(f"{host}:{port} cannot be used: {os.strerror(error.errno or 0)}\n  try {fix}") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine's own programs reach the socket."""
    import ipaddress

    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """Return the URL under which this machine reaches the socket."""
    address, port = listener.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    return f"http://{name}:{port}"


def run(
    listener: socket.socket,
    start: Callable[[], Awaitable[Running]],
    *,
    drain: float,
    ready: Callable[[], None],
    stopped: Callable[[StoppedError], int],
) -> None:
    """Do as `serve` does, and end the process once a signal has stopped it. stopped: says so; returns the exit code.

    The process ends inside the event loop: asyncio.run would join threads first that wait for a disk or the network,
    and that may never come back. Raises what `start` raises, and LorakitError for a server that stopped by itself.
    """

    async def serving() -> None:
        try:
            await serve(listener, start, drain=drain, ready=ready)
        except StoppedError as error:
            code = stopped(error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    asyncio.run(serving())


async def serve(
    listener: socket.socket, start: Callable[[], Awaitable[Running]], *, drain: float, ready: Callable[[], None]
) -> None:
    """Start, answer requests until a signal comes, and stop. Raises StoppedError that names the signal.

    start: makes the application; what it raises is raised. ready: called once requests are answered.
    """
    with _signals() as stopped:
        starting: asyncio.Future[Any] = asyncio.ensure_future(start())
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting], timeout=2 * AFTER_DRAIN)  # it lets go of what it began
            if starting.done() and not starting.cancelled():
                starting.result()
            listener.close()
            raise StoppedError(f"stopped by {stopped.result()} before it was ready", stopped.result())
        running: Running = starting.result()
        server = _server(running.app, drain)
        answering = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started and not answering.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await asyncio.wait([answering, stopped], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        try:
            async with asyncio.timeout(drain + 2 * AFTER_DRAIN):
                await asyncio.gather(
                    running.stop(drain), answering
                )  # the engine ends the answers that uvicorn waits for
        except TimeoutError:
            LOG.error("the engine did not stop in time; what it still computes is given up")
        if not stopped.done():
            raise LorakitError("the server stopped by itself\n  its log, above, says why")
        raise StoppedError(f"stopped by {stopped.result()}", stopped.result())


def _server(app: App, drain: float) -> Any:
    import uvicorn

    from .connections import Connection, Server

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever reaches us could claim to be another client
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=int(drain + AFTER_DRAIN),
    )
    return Server(config)


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Future[str]]:
    """Yield a future that gets the name of the first signal. The second one ends the process."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()
    count = 0

    def first(name: str) -> None:
        if not stopped.done():
            stopped.set_result(name)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            os._exit(128 + number)  # not sys.exit, which waits for threads that compute
        loop.call_soon_threadsafe(first, signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
