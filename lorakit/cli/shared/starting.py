"""The line a command prints before it imports torch and transformers, which takes seconds.

    with starting("reading the adapter"):
        from ..adapter.combine import combined

On a terminal the line is cleared when the block ends, which should be when there is something else to show; elsewhere
it stays. It goes to stderr, so that stdout holds only the result (--json).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CLEAR = "\r\x1b[2K"  # return to the start of the line and erase it


@contextmanager
def starting(what: str, quiet: bool = False) -> Iterator[None]:
    """Print `what` is being done while the block runs. `quiet`: print nothing."""
    terminal = sys.stderr.isatty()
    if not quiet:
        print(f"lorakit: {what} ...", end="" if terminal else "\n", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if terminal and not quiet:
            print(_CLEAR, end="", file=sys.stderr, flush=True)


def notice(text: str) -> None:
    """Print a line to stderr; inside `starting` on a terminal, it takes the place of the starting line."""
    print(f"{_CLEAR if sys.stderr.isatty() else ''}{text}", file=sys.stderr, flush=True)
