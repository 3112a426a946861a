"""Server-sent events: `data: {json}` and an empty line, `data: [DONE]` at the end.

A stream sends a chunk for every token of every answer, so a chunk costs little: what stays the same is encoded once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Send

from .errors import described
from .forms import Usage
from .replies import json_bytes

TOGETHER = 8  # tokens in one write, where the engine is faster than the socket
DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def text_json(text: str) -> bytes:
    """Encode a text as a JSON string."""
    return _ENCODER.encode(text).encode("utf-8", "backslashreplace")


class Chunks:
    """Chunks of one stream, as events. fixed: the keys that all have. with_usage: the last one counts the tokens."""

    def __init__(self, fixed: Mapping[str, Any], with_usage: bool):
        self._head = b"data: " + json_bytes(fixed)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage

    def of(self, choice: bytes) -> bytes:
        """Return the chunk with one entry of `choices`, given as JSON."""
        return self._head + choice + self._tail

    def last(self, usage: Usage) -> bytes:
        """Return what ends the stream."""
        return (self._head + b'],"usage":' + json_bytes(usage) + b"}\n\n" if self._with_usage else b"") + DONE


class EventStream:
    """A response of events. It begins with the first `flush`; an error after that goes into the stream."""

    def __init__(self, send: Send, headers: Mapping[str, str]):
        self._send, self._headers = send, headers
        self._waiting: list[bytes] = []
        self._is_broken = False  # nothing more can be sent
        self.begun = False

    def add(self, events: bytes) -> None:
        """Add events to the next write."""
        self._waiting.append(events)

    @property
    def full(self) -> bool:
        """Whether it is time to write, even if more events are at hand."""
        return len(self._waiting) >= TOGETHER

    async def flush(self, last: bool = False) -> None:
        """Send what was added. last: it ends the response.

        Waits while the client is slow to read: meanwhile pieces wait in the ticket.
        """
        if not self.begun:
            self.begun = True
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # nginx would collect the events
            } | dict(self._headers)
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
            await self._write({"type": "http.response.start", "status": 200, "headers": raw})
        events, self._waiting = b"".join(self._waiting), []
        await self._write({"type": "http.response.body", "body": events, "more_body": not last})

    async def _write(self, message: Message) -> None:
        try:
            await self._send(message)
        except Exception:
            self._is_broken = True
            raise

    async def fail(self, error: Exception) -> None:
        """End the stream with an error: no [DONE], so that nobody takes half an answer for all of it.

        If it was sending that failed, the error is raised: a client that does not read would hold its adapters for as
        long again.
        """
        if self._is_broken:
            raise error
        _, body, _ = described(error)
        self.add(b"event: error\ndata: " + json_bytes(body) + b"\n\n")
        await self.flush(last=True)
