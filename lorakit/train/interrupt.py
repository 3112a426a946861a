"""Ctrl-C (and a scheduler's SIGTERM) as a wish, granted after the step: the run saves and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupt:
    """`signal`: its name, once one came. A second Ctrl-C stops at once."""

    signal: str | None = None


@contextmanager
def listening() -> Iterator[Interrupt]:
    """Catch the signals inside the block; the former handlers come back after it. Outside the main thread it never
    fires.
    """
    state = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        if state.signal is not None:
            raise KeyboardInterrupt
        state.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
