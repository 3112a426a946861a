"""A response that is computed while it listens: when the client hangs up, the work is cancelled.

Streamed or not, a request holds slots of the engine. Cancelling its task leaves the `with` blocks that it is in, which
cancel its tickets and give its adapters back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class Answering(Response):
    """`answer(send)` writes the response, or raises before it has begun. It is cancelled if the client goes away."""

    def __init__(self, answer: Callable[[Send], Awaitable[None]]):
        """answer: called once, when the request has been read."""
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client hangs up first. Raises what `answer` raises."""
        answering = asyncio.ensure_future(self._answer(send))
        # Not awaited after it was cancelled: some servers' `receive` returns only once the response is complete.
        hang_up = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait((answering, hang_up), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            else:
                answering.cancel()
                await asyncio.wait((answering,))
        finally:
            answering.cancel()
            hang_up.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
