"""JSON as bytes, and responses made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Send


def json_bytes(content: Any) -> bytes:
    """Encode as compact JSON in UTF-8.

    A client may send half of a surrogate pair, which UTF-8 cannot hold: it goes back as the escape that it came as.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class Json(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        """content: anything that JSON can hold."""
        super().__init__(json_bytes(content), status, dict(headers or {}))


async def send_json(send: Send, content: Any, headers: Mapping[str, str]) -> None:
    """Send an answer of status 200 in full."""
    reply = Json(content, headers=headers)
    await send({"type": "http.response.start", "status": 200, "headers": reply.raw_headers})
    await send({"type": "http.response.body", "body": reply.body})
