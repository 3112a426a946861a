"""The exit code of a job that a signal stopped, as shells have it: 128 plus the signal's number."""

from __future__ import annotations

import signal


def of_signal(name: str | None) -> int:
    """Return 130 for "SIGINT", 143 for "SIGTERM"; 1 for anything else, such as "failed"."""
    member = signal.Signals.__members__.get(name or "")
    return 1 if member is None else 128 + member
