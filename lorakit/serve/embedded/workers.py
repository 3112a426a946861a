"""Threads that do jobs in order of arrival."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


class Workers:
    """Threads for one kind of job. They end with the process, as one may hang in a file that does not answer."""

    def __init__(self, name: str, threads: int):
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._closed = False
        for number in range(threads):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def run(self, job: Callable[[], None]) -> None:
        """Queue a job, which should not raise. After `close` nothing happens."""
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._changed.notify()

    def close(self) -> None:
        """Drop the jobs that wait, and let the threads end when they are done with theirs."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:  # a mistake of ours; the jobs behind it need the thread
                log.exception("a job of the thread %s failed", threading.current_thread().name)
            del job  # it may hold an adapter, and the next one may be long in coming
