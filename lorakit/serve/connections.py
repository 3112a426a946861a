"""uvicorn's server and its connections, each with one thing changed. Imported only when a server runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0  # for a request's headers to arrive


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the first signal must reach the engine too."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `server.serve`."""
        yield


class Connection(H11Protocol):
    """A connection that is closed if no complete request arrives on it.

    uvicorn waits for the rest of the headers for ever, so whoever opens enough connections, without any key, would take
    all there may be.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._look, self.cycle)

    def _look(self, before: Any) -> None:
        """Close it if since the last look no request has begun, and none is being answered."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is before:
            self.transport.close()
        else:
            self._look_later()
