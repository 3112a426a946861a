"""All guards around the application, in the order in which a request meets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .asgi import App, Receive, Scope, Send, refuse
from .body import bounded_body
from .hosts import LOOPBACK, only_hosts
from .keys import Keys, only_with_key
from .limits import Limits
from .origins import only_origins
from .shield import shielded

PROBES = frozenset({"/health", "/metrics"})  # a full server must still say that it lives


@dataclass(frozen=True)
class GuardSettings:
    """hosts: from `host_names`. origins: from `origin_names`. open: requests that may be under way at once."""

    hosts: frozenset[str] = LOOPBACK
    origins: frozenset[str] = frozenset()
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    open: int = 1_024


def guarded(app: App, settings: GuardSettings, report: Callable[[str, BaseException], None]) -> App:
    """Return `app` behind the guards. report: gets a request's id and the error that broke its answer."""
    limits = settings.limits
    app = bounded_body(app, limits.body, limits.nesting)
    app = bounded_crowd(app, settings.open)
    app = only_with_key(app, settings.keys)
    app = only_origins(app, settings.origins)
    app = only_hosts(app, settings.hosts)
    return shielded(app, report)


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
            await refuse(send, 429, message, "too_many_requests", more={"retry-after": "1"})
            return
        open_now += 1
        try:
            await app(scope, receive, send)
        finally:
            open_now -= 1

    return counted
