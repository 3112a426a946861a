"""Watch requests from outside all guards: what came, what was answered, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .guard.asgi import App, Message, Receive, Scope, Send
from .guard.shield import REQUEST_ID

HUNG_UP = 499  # nginx's status for a client that left before the answer began
ADAPTER_HEADER = b"x-lorakit-adapter"


@dataclass(frozen=True)
class RequestLog:
    """A request that has ended. No part of what it asked for or was answered is in here."""

    client: str
    method: str
    path: str
    status: int
    seconds: float  # from its headers to the answer's end
    first: float | None  # from its headers to the first part of the answer's body; None if there was none
    complete: bool  # the answer was sent to its end
    adapter: str | None  # as the answer names it: name@hash
    id: str


def observed(app: App, watchers: Sequence[Callable[[RequestLog], None]]) -> App:
    """Return `app`; every watcher is called once after each request."""

    async def watching(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began = time.monotonic()
        status, first, complete, adapter = HUNG_UP, None, False, None

        async def sending(message: Message) -> None:
            nonlocal status, first, complete, adapter
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
                named = (value for name, value in message.get("headers", ()) if name.lower() == ADAPTER_HEADER)
                adapter = next((value.decode("latin-1") for value in named), None)
            elif message["type"] == "http.response.body":
                if first is None and message.get("body"):
                    first = time.monotonic() - began
                complete = not message.get("more_body", False)

        try:
            await app(scope, receive, sending)
        finally:
            seen = RequestLog(
                client=(scope.get("client") or ("-", 0))[0],
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=time.monotonic() - began,
                first=first,
                complete=complete,
                adapter=adapter,
                id=scope.get(REQUEST_ID, "-"),
            )
            for watcher in watchers:
                watcher(seen)

    return watching
