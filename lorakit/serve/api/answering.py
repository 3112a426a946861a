"""A response that is computed while it listens: when the client hangs up, the work is cancelled.

Streamed or not, a request holds slots of the engine. Cancelling its task leaves the `with` blocks that it is in, which
cancel its tickets and give its adapters back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import TimedOut

# The engine ends an answer whose time is over. What it does not see, a client that does not read the rest of its answer
# or an adapter that is read from a disk that hangs, is cut off so much later.
GRACE = 5.0


class Answering(Response):
    """`answer(send)` writes the response, or raises before it has begun. It is cancelled if the client goes away."""

    def __init__(self, answer: Callable[[Send], Awaitable[None]], seconds: float):
        """answer: called once, when the request has been read. seconds: the most it may take, before GRACE."""
        super().__init__()
        self._answer, self._seconds = answer, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client hangs up first. Raises what `answer` raises, or TimedOut."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        answering = asyncio.ensure_future(self._answer(sending))
        # Not awaited after it was cancelled: some servers' `receive` returns only once the response is complete.
        hang_up = asyncio.ensure_future(_hung_up(receive))
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait((answering, hang_up), timeout=self._seconds + GRACE, return_when=first)
            if answering.done():
                answering.result()
                return
            answering.cancel()
            await asyncio.wait((answering,))
            if not hang_up.done() and not begun:
                raise TimedOut(f"the request was not answered within {self._seconds:g} seconds")
        finally:
            answering.cancel()
            hang_up.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
