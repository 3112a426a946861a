"""Two keys: one to use the models, one to manage the server. They are checked before the body is read.

A key comes from a file or from the environment, never from the command line, where every user of the machine sees it.
A file may hold several, one a line, so that each client has its own and they can be changed one after the other.
"""

from __future__ import annotations

import hmac
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import ConfigError, LorakitWarning
from .asgi import App, Receive, Scope, Send, header, refuse

USE_VARIABLE = "LORAKIT_API_KEY"
MANAGE_VARIABLE = "LORAKIT_MANAGE_KEY"
MIN_LENGTH = 16  # characters; 16 random hexadecimal digits outlast any guessing: 10^8 years at 1,000 tries a second
MANAGING = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics"})
OPEN = frozenset({"/health"})  # says only whether the server is up; probes have no key

Need = Literal["nothing", "use", "manage"]


@dataclass(frozen=True)
class Keys:
    """The keys that are accepted. Without any, everybody who reaches the server may do everything."""

    use: tuple[str, ...] = ()
    manage: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Keys(use={len(self.use)}, manage={len(self.manage)})"  # they must not end in a log


def read_keys(file: Path | None, variable: str, flag: str, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Read keys from a file, one a line, else from the environment's `variable`; () if neither is given.

    Lines that are empty or begin with # do not count. Raises ConfigError for a file that cannot be read, has no key,
    and for keys that are short or hold characters that a header cannot.
    """
    if file is None:
        where, lines = variable, [environ.get(variable, "")]
        if not lines[0].strip():
            return ()
    else:
        where = f"{flag} {file}"
        try:
            lines = file.expanduser().read_text(encoding="utf8").splitlines()
            others_read = os.name == "posix" and file.expanduser().stat().st_mode & stat.S_IROTH
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"{where}: the file cannot be read: {reason}") from error
        if others_read:
            note = f"{where}: every user of this machine can read it; chmod 600 keeps the key secret"
            warnings.warn(note, LorakitWarning, stacklevel=2)
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    fix = "  make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
    if not keys:
        raise ConfigError(f"{where}: there is no key in it; expected one a line\n{fix}")
    for key in keys:
        if len(key) < MIN_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(
                f"{where}: a key has {len(key)} characters\n"
                f"  expected at least {MIN_LENGTH}, of ASCII and without spaces\n{fix}"
            )
    return keys


def need_of(path: str) -> Need:
    """Say which key a request for `path` needs."""
    return "nothing" if path in OPEN else "manage" if path in MANAGING else "use"


def only_with_key(app: App, keys: Keys) -> App:
    """Answer 401 to requests without a known key, and 403 to those with one that is not enough."""
    if not keys.use and not keys.manage:
        return app

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        need = need_of(scope["path"]) if scope["type"] == "http" else "nothing"
        if need == "nothing" or (need == "use" and not keys.use):
            await app(scope, receive, send)
            return
        given = _bearer(scope)
        manages, uses = _is_one_of(given, keys.manage), _is_one_of(given, keys.use)
        if manages or (uses and need == "use"):
            await app(scope, receive, send)
        elif uses and not keys.manage:
            message = f"{scope['path']} needs the manage key, and this server has none: start it with --manage-key-file"
            await refuse(send, 403, message, "no_manage_key")
        elif uses:
            message = f"{scope['path']} needs the manage key; the one given is for using the models"
            await refuse(send, 403, message, "manage_key_needed")
        else:
            what = "no key was given" if given is None else "the key is not known"
            message = f"{what}; expected the header 'Authorization: Bearer KEY'"
            await refuse(send, 401, message, "invalid_api_key", more={"www-authenticate": "Bearer", **_closing(scope)})

    return checked


def _bearer(scope: Scope) -> str | None:
    scheme, _, key = (header(scope, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _is_one_of(given: str | None, keys: tuple[str, ...]) -> bool:
    """Compare with every key, in a time that does not depend on how much of one is right."""
    found = False
    for key in keys:
        found |= hmac.compare_digest((given or "").encode("utf8", "surrogateescape"), key.encode())
    return found


def _closing(scope: Scope) -> dict[str, str]:
    """End the connection rather than receive a large body from somebody without a key."""
    length = header(scope, b"content-length") or "0"
    small = length.isdigit() and int(length) <= 65_536 and header(scope, b"transfer-encoding") is None
    return {} if small else {"connection": "close"}
