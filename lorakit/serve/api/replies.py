"""What all replies have: JSON as bytes, the keys and headers of completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Send

from ..card import Leased
from ..service import Service


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


def fixed(kind: str, prefix: str, leased: Leased, service: Service) -> dict[str, Any]:
    """Return the keys that all chunks of an answer have, and the answer itself. kind: `object`. prefix: of its id."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": leased.model,
        "system_fingerprint": service.fingerprint,
    }


def adapter_header(leased: Leased) -> dict[str, str]:
    """Return the header that names the adapters that answer, with their versions; none for the base.

    An adapter of weight 0 lends its template, and does not change the model.
    """
    keys = {key for key, _ in leased.choice}
    versions = [card.version for card in leased.cards if card.key in keys]
    return {"x-lorakit-adapter": "+".join(versions)} if versions else {}
