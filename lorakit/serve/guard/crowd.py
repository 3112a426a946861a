"""Bound the requests that are under way at once, those included that wait for their body or for a slot."""

from __future__ import annotations

from .asgi import App, Receive, Scope, Send, refuse

PROBES = frozenset({"/health", "/metrics"})  # a full server must still say that it lives


def bounded_crowd(app: App, most: int) -> App:
    """Answer 429, with Retry-After, to a request that comes while `most` others are under way."""
    open_now = 0

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal open_now
        if scope["type"] != "http" or scope["path"] in PROBES:
            await app(scope, receive, send)
            return
        if open_now >= most:
            message = f"{most:,} requests are under way, which is all this server takes; ask again in a second"
            await refuse(send, 429, message, "too_many_requests", kind="rate_limit_error", more={"retry-after": "1"})
            return
        open_now += 1
        try:
            await app(scope, receive, send)
        finally:
            open_now -= 1

    return counted
