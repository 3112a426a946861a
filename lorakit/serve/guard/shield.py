"""The outermost guard: an id for each request, no stack traces in answers, and an end to clients that do not read."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from .asgi import App, Message, Receive, Scope, Send, refuse

SEND_SECONDS = 60.0  # for the client to take what was sent; then its connection is closed
REQUEST_ID = "request_id"  # its key in the scope


def shielded(app: App, report: Callable[[str, BaseException], None], seconds: float = SEND_SECONDS) -> App:
    """Answer 500 without details where `app` breaks. report: gets the request's id and the error, for the log."""

    async def protected(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        name = f"req-{secrets.token_hex(12)}"
        scope[REQUEST_ID] = name
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                more = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            try:
                async with asyncio.timeout(seconds):
                    await send(message)
            except TimeoutError:
                raise Broken(name) from None

        try:
            await app(scope, receive, sending)
        except Broken:
            raise
        except asyncio.CancelledError:  # the server is stopping, and this answer took too long
            raise Broken(name) from None
        except Exception as error:
            report(name, error)
            if started:
                # What was sent looks complete otherwise. The server closes the connection of a broken answer.
                raise Broken(name) from None
            message = f"the server failed; its log has the reason under {name}"
            await refuse(sending, 500, message, "internal_error")

    return protected


class Broken(Exception):
    """An answer that ended early: it was reported already, its reader does not read, or the server is stopping."""
