"""Whether the Hugging Face hub answers at all, asked before its libraries, which retry for half a minute.

A name that is neither here nor in the cache, on a machine without a connection, is then an error within a second.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import LorakitError, did_you_mean

ENDPOINT = "https://huggingface.co"
# A connection takes well under half a second around the world. Without one, most systems say so at once; this is for
# those whose packets are dropped.
SECONDS = 0.8
_NAME = re.compile(r"(?:hf://)?([\w][\w.-]*)(?:/([\w][\w.-]*))?")  # a hub id's start: OWNER/NAME, or an old NAME


def check_hub(name: str, expected: str, kind: str = "models") -> None:
    """Raise LorakitError if `name` is not here, was never fetched, and cannot be fetched, as the hub is out of reach.

    `expected`: what the name may be, for the message; `kind`: "models" or "datasets".
    """
    path = Path(name).expanduser()
    found = _NAME.match(name)
    if path.is_symlink() and not path.exists():
        raise LorakitError(f"{name} is a link that leads nowhere, or in a circle\n  expected {expected}")
    if path.exists() or found is None or is_cached(found, kind):
        return
    why = out_of_reach()
    if why is not None:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise LorakitError(
            f"there is no '{name}' here{near}, and the hub cannot be reached: {why}\n"
            f"  expected {expected}; check the name, or the network (and HF_ENDPOINT if it is set)"
        )


def is_cached(name: re.Match[str], kind: str) -> bool:
    """Whether anything of this repository was fetched before."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    caches = [os.environ.get("HF_HUB_CACHE") or Path(home, "hub")]
    if kind == "datasets":
        caches.append(os.environ.get("HF_DATASETS_CACHE") or Path(home, "datasets"))
    ids = "/".join(part for part in name.groups() if part)
    folders = (f"{kind}--{ids.replace('/', '--')}", ids.replace("/", "___"))
    return any(Path(cache, folder).expanduser().is_dir() for cache in caches for folder in folders)


def out_of_reach() -> str | None:
    """Return why no connection to the hub (or to the proxy on the way) can be made; None if one can."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    url = urlsplit(os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT)
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and url.hostname and not proxy_bypass(url.hostname):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}", "http")
    address = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    said: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, SECONDS).close()
            said.append(None)
        except OSError as error:
            said.append(str(error))

    # In a thread, as looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return said[0] if said else f"{address[0]} did not answer within {SECONDS:g} s"
