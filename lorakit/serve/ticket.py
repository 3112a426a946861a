"""A request's answer on its way: the engine puts pieces in, from any thread; the API takes them out of the event loop.

The queue of pieces is bounded. A client that does not read stops the API from taking pieces out, and when `LIMIT` of
them wait, the request is cancelled: it must not hold a slot for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Piece

LIMIT = 512  # pieces that may wait for the reader


class Ticket:
    """An answer being computed. `async for piece in ticket` ends after the piece with `finish`, or raises the error."""

    def __init__(self, on_cancel: Callable[[], None]):
        """Make a ticket, in the event loop's thread. on_cancel: tells the engine, once, that nobody reads any more."""
        self.loop = asyncio.get_running_loop()
        self._on_cancel = on_cancel
        self._pieces: deque[Piece | Exception] = deque()
        self._arrived = asyncio.Event()
        self._ended = False  # the last piece is in the queue, or has been read
        self._cancelled = False

    @property
    def waiting(self) -> int:
        """Pieces that wait for the reader."""
        return len(self._pieces)

    def cancel(self) -> None:
        """Say that nobody reads any more. The engine frees the slot within a step. May be called at any time, twice."""
        if not self._ended and not self._cancelled:
            self._cancelled = True
            self._on_cancel()

    def put(self, piece: Piece | Exception) -> None:
        """Add a piece, or the error that ends the answer. Only in the event loop's thread; see `deliver` for others."""
        if self._ended:
            return
        self._pieces.append(piece)
        self._ended = isinstance(piece, Exception) or piece.finish is not None
        self._arrived.set()
        if len(self._pieces) > LIMIT:
            self.cancel()

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Piece:
        while not self._pieces:
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        piece = self._pieces.popleft()
        if isinstance(piece, Exception):
            raise piece
        return piece


def deliver(loop: asyncio.AbstractEventLoop, pieces: Iterable[tuple[Ticket, Piece | Exception]]) -> None:
    """Put the pieces of one step into their tickets from another thread, in one call into the event loop."""
    batch = list(pieces)

    def put_all() -> None:
        for ticket, piece in batch:
            ticket.put(piece)

    if batch and not loop.is_closed():
        loop.call_soon_threadsafe(put_all)
