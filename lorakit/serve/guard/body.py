"""Read a request's body within bounds of bytes, time and nesting, before the application sees it.

Bytes are counted as they arrive, whatever Content-Length says. JSON that is nested deeply would exhaust the stack of
whoever parses it, so its brackets are counted first; for that it must be UTF-8, which has no NUL in JSON.
"""

from __future__ import annotations

import asyncio
import codecs
import re

from .asgi import App, Message, Receive, Scope, Send, header, refuse

READ_SECONDS = 30.0  # for a body to arrive; a client that sends a byte now and then holds a connection for nothing
# A body that is too large is read to its end up to this many times the bound, and dropped: a client that is still
# sending when the connection is closed sees a reset instead of the answer, and tries again.
DISCARDED = 16
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # one that is never closed reaches to the end
_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's begin with one of them, or with a NUL
_BRACKETS = re.compile(rb"[\[\]{}]")


def bounded_body(app: App, most: int, nesting: int, seconds: float = READ_SECONDS) -> App:
    """Answer 413 to bodies of more than `most` bytes, 408 to slow ones, and 400 to those that are not in UTF-8 or have
    more than `nesting` levels of JSON.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        if header(scope, b"content-encoding") not in (None, "identity"):
            await refuse(send, 415, "compressed bodies are not read; send the JSON as it is", "unsupported_encoding")
            return
        try:
            async with asyncio.timeout(seconds):
                body = await _read(scope, receive, most)
        except TimeoutError:
            message = f"the request's body did not arrive within {seconds:g} seconds"
            await refuse(send, 408, message, "body_timeout", more={"connection": "close"})
            return
        except ConnectionError:  # the client has gone; nobody reads an answer
            return
        if body is None:
            message = f"the request's body has more than {most:,} bytes"
            await refuse(send, 413, message, "body_too_large", more={"connection": "close"})
        elif body.startswith(_MARKS) or b"\0" in body:
            # Parsers of JSON read these encodings too, and in them the brackets could not be counted.
            await refuse(send, 400, "the request's body is not JSON in UTF-8", "not_utf8")
        elif depth_exceeds(body, nesting):
            message = f"the request's JSON is nested more than {nesting} levels deep"
            await refuse(send, 400, message, "nested_too_deep")
        else:
            await app(scope, _replay(body, receive), send)

    return checked


async def _read(scope: Scope, receive: Receive, most: int) -> bytes | None:
    """Return the body; None if it is too large. Raises ConnectionError if the client hangs up."""
    length = header(scope, b"content-length") or ""
    if length.isdigit() and int(length) > most * DISCARDED:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client hung up")
        part = message.get("body", b"")
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > most * DISCARDED:
            return b"".join(parts) if size <= most else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out the body once; then what the server reports, which is the client's hanging up."""
    given = False

    async def replaying() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replaying


def depth_exceeds(body: bytes, most: int) -> bool:
    """Whether brackets outside of JSON strings are nested more than `most` levels deep. In linear time."""
    depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > most:
            return True
    return False
