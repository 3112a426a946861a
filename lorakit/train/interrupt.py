"""Stop a run on Ctrl-C or SIGTERM after the current step, so that it can save a checkpoint and be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupt:
    """Whether a stop was requested. `signal`: the signal's name once it arrived. A second signal stops at once."""

    signal: str | None = None


def exit_code(stopped: str | None) -> int:
    """Return the exit code of a process that a signal stopped, as shells have it (130 for Ctrl-C); 1 without one."""
    known = stopped in signal.Signals.__members__
    return 128 + signal.Signals[stopped] if stopped is not None and known else 1


@contextmanager
def catching_signals() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM inside the block, and restore the previous handlers after it.

    Yields the `Interrupt` that they set. Outside the main thread, where Python delivers no signals, it is never set.
    """
    state = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if state.signal is not None:
            raise KeyboardInterrupt
        state.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
