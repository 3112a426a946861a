"""The types of an ASGI application, and how a request is refused before it reaches ours.

A guard is a function from an application to an application. It sees the request first, and either passes it on or
answers with `refuse`. The specification: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from ..error_body import error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def header(scope: Scope, name: bytes) -> str | None:
    """Return a request header's value, the first if there are several. name: in lower case."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def headers(scope: Scope, name: bytes) -> list[str]:
    """Return all values of a request header. name: in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def refuse(send: Send, status: int, message: str, code: str, *, more: Mapping[str, str] | None = None) -> None:
    """Answer with an error object as OpenAI's servers send it.

    The clients ask again after 408, 409, 429 and 5xx unless `x-should-retry` says no; what will not heal by itself must
    not be asked for again. more: further headers.
    """
    body = json.dumps(error_body(message, status, None, code)).encode()
    answer = {"content-type": "application/json", "content-length": str(len(body)), **(more or {})}
    if status != 429:
        answer.setdefault("x-should-retry", "false")
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
