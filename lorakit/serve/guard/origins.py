"""Refuse changes that another web page asks for, and answer CORS only to the origins that were named at the start.

A browser sends Origin with every POST. A foreign one means that a page the user merely visits is calling us, with the
user's access to loopback. Without --cors-origin no answer has a CORS header, so such a page cannot read one either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import ConfigError
from .asgi import App, Message, Receive, Scope, Send, header, refuse

ANY = "*"
SAFE = frozenset({"GET", "HEAD"})
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{1,5})?", re.ASCII)
_NAMES = re.compile(r"[A-Za-z0-9_-]+(\s*,\s*[A-Za-z0-9_-]+)*", re.ASCII)
_EXPOSED = b"x-request-id, x-should-retry, retry-after, retry-after-ms, x-lorakit-adapter, x-lorakit-warning"


def origin_names(allowed: Iterable[str]) -> frozenset[str]:
    """Check --cors-origin: scheme, host and port, as browsers write them. Raises ConfigError."""
    names = set()
    for name in allowed:
        plain = name.lower().rstrip("/")
        if name != ANY and not _ORIGIN.fullmatch(plain):
            raise ConfigError(
                f"--cors-origin {name}: not an origin\n"
                "  expected scheme, host and port as the browser sends them: --cors-origin http://localhost:3000"
            )
        names.add(plain)
    return frozenset(names)


def only_origins(app: App, origins: frozenset[str]) -> App:
    """Answer 403 to changes asked for by a foreign page; add CORS headers for `origins`, from `origin_names`."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        origin = header(scope, b"origin") if scope["type"] == "http" else None
        if origin is None:
            await app(scope, receive, send)
            return
        allowed = ANY in origins or origin.lower() in origins
        if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None and allowed:
            await _preflight(scope, send, origin)
        elif allowed:
            await app(scope, receive, _with_cors(send, origin))
        elif scope["method"] in SAFE or _is_own(origin, scope):
            await app(scope, receive, send)
        else:
            await refuse(
                send,
                403,
                f"requests from pages of '{origin[:100]}' are not allowed. "
                "To allow them, start the server with --cors-origin ORIGIN",
                "origin_not_allowed",
            )

    return checked


def _is_own(origin: str, scope: Scope) -> bool:
    """Whether the page came from this server. Without the scheme: behind a proxy that ends TLS, ours differs."""
    return origin.lower().partition("://")[2] == (header(scope, b"host") or "").strip().lower()


async def _preflight(scope: Scope, send: Send, origin: str) -> None:
    asked = header(scope, b"access-control-request-headers") or ""
    names = asked if len(asked) < 2_000 and _NAMES.fullmatch(asked.strip()) else "authorization, content-type"
    answer = [
        *_cors(origin),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", names.encode("latin-1")),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body", "body": b""})


def _with_cors(send: Send, origin: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [*_cors(origin), (b"access-control-expose-headers", _EXPOSED)]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
