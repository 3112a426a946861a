"""Call an ASGI application without a server, and see which parts of the request's body it read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """status: None if there was no answer. reads: the parts of the body that were asked for."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reads: int = 0
    error: BaseException | None = None

    @property
    def code(self) -> str | None:
        """The error object's code."""
        return json.loads(self.body)["error"]["code"]

    @property
    def message(self) -> str:
        return json.loads(self.body)["error"]["message"]


def call(
    app: Any,
    path: str = "/v1/models",
    method: str = "GET",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    parts: Sequence[bytes] = (b"",),
    host: str | None = "localhost:8000",
    hang_up_after: int | None = None,
) -> Answer:
    """Send a request. parts: of its body. hang_up_after: the client leaves after that many parts."""
    pairs = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
    if host is not None:
        pairs.insert(0, ("host", host))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "client": ("127.0.0.1", 4711),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs],
    }
    answer = Answer()

    async def receive() -> dict[str, Any]:
        at = answer.reads
        answer.reads += 1
        if hang_up_after is not None and at >= hang_up_after:
            return {"type": "http.disconnect"}
        if at >= len(parts):
            await asyncio.sleep(60)
        return {"type": "http.request", "body": parts[at], "more_body": at + 1 < len(parts)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    async def run() -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            answer.error = error

    asyncio.run(run())
    return answer


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the request's body."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})
