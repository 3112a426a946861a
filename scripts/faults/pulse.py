"""Asks /health all the time, and notes the longest answer: whatever holds up the event loop holds up everybody."""

from __future__ import annotations

import threading
import time

from .process import Server

PAUSE = 0.2  # seconds between two questions


class Pulse:
    """While the block runs. longest: seconds; count: questions."""

    def __init__(self, server: Server):
        self.server, self.longest, self.count = server, 0.0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(PAUSE):
            began = time.monotonic()
            try:
                self.server.ask("GET", "/health")
            except OSError:  # it died, which the part says
                return
            self.longest = max(self.longest, time.monotonic() - began)
            self.count += 1
