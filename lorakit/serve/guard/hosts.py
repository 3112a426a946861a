"""Refuse requests whose Host header is not a name of this server.

A web page may let its own name resolve to 127.0.0.1 after it was loaded (DNS rebinding). The browser then takes our
server for the page's own and applies no CORS rule; only the Host header still says which name was asked for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from ...errors import ConfigError
from .asgi import App, Receive, Scope, Send, headers, refuse

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
ANY = "*"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?)(:\d{1,5})?", re.ASCII)


def host_names(bound: str, allowed: Iterable[str]) -> frozenset[str]:
    """Return the names under which requests are answered: loopback's, the one that is bound, and those allowed.

    bound: --host; 0.0.0.0 and :: stand for every address and name none. allowed: --allow-host, without ports; "*"
    turns the check off. Raises ConfigError for what is not a host's name.
    """
    names = set(LOOPBACK)
    if not is_wildcard(bound):
        names.add(_bracketed(bound.lower()))
    for name in allowed:
        plain = _bracketed(name.lower().rstrip("."))
        found = _HOST.fullmatch(plain)
        if name != ANY and (found is None or found[3]):
            raise ConfigError(
                f"--allow-host {name}: not a host's name\n"
                "  expected the name alone, without http:// and port: --allow-host models.example.org"
            )
        names.add(plain if name != ANY else ANY)
    return frozenset(names)


def is_wildcard(host: str) -> bool:
    """Whether binding to `host` listens on every address."""
    return host in ("0.0.0.0", "::", "[::]")


def only_hosts(app: App, names: frozenset[str]) -> App:
    """Answer 400 to requests for another host. names: from `host_names`."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ANY not in names:
            given = headers(scope, b"host")
            name = host_of(given[0]) if len(given) == 1 else None
            if name not in names:
                shown = f"'{given[0][:100]}'" if given else "missing"
                await refuse(
                    send,
                    400,
                    f"the Host header is {shown}; this server answers for {', '.join(sorted(names))}. "
                    "To allow another name, start it with --allow-host NAME",
                    "host_not_allowed",
                )
                return
        await app(scope, receive, send)

    return checked


def host_of(value: str) -> str | None:
    """Return the name in a Host header, in lower case and without port and final dot; None if it is malformed."""
    found = _HOST.fullmatch(value.strip().lower())
    return found[1].rstrip(".") if found else None


def _bracketed(name: str) -> str:
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name
    return f"[{address}]" if address.version == 6 else str(address)
