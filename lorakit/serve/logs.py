"""The server's log on stderr: a line for each request, and errors with their traceback. No prompts, answers and keys.

    2026-11-30T18:20:03Z 127.0.0.1 "POST /v1/chat/completions" 200 0.412s adapter=sql@3fa9c1 req-5f0c…

An unexpected error is logged with the lines it passed through but without its message, which may quote the request.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import Any, TextIO

from .guard.shield import Broken
from .observe import RequestLog

LOG = logging.getLogger("lorakit.serve")
_PATH_LENGTH = 200


def configure(access: bool = True, stream: TextIO | None = None) -> None:
    """Send our log and uvicorn's warnings to `stream`, or stderr. access: a line for each request too."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Form("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
    handler.addFilter(_was_not_reported)
    for log, level in ((LOG, logging.INFO if access else logging.WARNING), (_uvicorn(), logging.WARNING)):
        log.handlers[:] = [handler]
        log.setLevel(level)
        log.propagate = False


def access_line(seen: RequestLog) -> None:
    """Log a request that has ended."""
    adapter = f" adapter={_plain(seen.adapter)}" if seen.adapter else ""
    cut = "" if seen.complete else " incomplete"
    LOG.info(
        '%s "%s %s" %d %.3fs%s%s %s',
        _plain(seen.client), _plain(seen.method), _plain(seen.path), seen.status, seen.seconds, cut, adapter, seen.id,
    )  # fmt: skip


def report(name: str, error: BaseException) -> None:
    """Log an error that broke the answer to the request `name`."""
    LOG.error("%s failed", name, exc_info=error)


class _Form(logging.Formatter):
    """Times in UTC, and errors without their messages."""

    converter = staticmethod(time.gmtime)

    def formatException(self, ei: Any) -> str:
        """Return the lines of code that the error passed through, and its type."""
        return f"{''.join(traceback.format_tb(ei[2]))}{ei[0].__qualname__}"


def _plain(text: str) -> str:
    """Return text that cannot start a line of its own nor colour the terminal."""
    shown = text if len(text) <= _PATH_LENGTH else f"{text[:_PATH_LENGTH]}..."
    return "".join(c if c.isprintable() and c != '"' else ascii(c)[1:-1] for c in shown)


def _was_not_reported(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], Broken))


def _uvicorn() -> logging.Logger:
    return logging.getLogger("uvicorn.error")
