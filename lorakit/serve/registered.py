"""What the registry notes of a public name: its card, where its files are, and how its last first use ended."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import LorakitError
from .card import Card
from .errors import Busy, EngineFailed, NoPlace, without_traceback
from .locations import Locate
from .sources import AdapterFiles, Stamp
from .versions import Version

# A failure that is not a file's (the hub is out of reach) is tried again after this time.
RETRY_SECONDS = 5.0
# Failures that heal by what others do. They are not remembered: the next use tries again.
_HEALING = (Busy, EngineFailed, NoPlace, OSError)

Origin = Literal["command line", "root", "http"]


@dataclass
class Registered:
    """One public name."""

    card: Card  # replaced, never changed, when the content is: requests keep the one they were leased
    origin: Origin
    locate: Locate
    asked: str  # the place as a client has to repeat it: of the command line, a path that no answer shows
    version: Version | None = None
    files: AdapterFiles | None = None  # of the version
    running: int = 0  # requests that hold it
    loading: asyncio.Task[None] | None = None  # the first use, which others wait for
    failed: tuple[Stamp, float, LorakitError] | None = None  # the files then (() if not found), the time, the error

    def remember(self, error: LorakitError, stamp: Stamp) -> None:
        """Note why the first use failed, unless it heals without a change of the files. stamp: the files then."""
        if not isinstance(error, _HEALING):
            self.failed = (stamp, time.monotonic(), without_traceback(error))
            self.card = replace(self.card, status="failed", problem=str(error))

    def fail_again(self, stamp: Stamp) -> None:
        """Raise the error of the last try if the files are as they were then; without files, for RETRY_SECONDS."""
        if self.failed is not None:
            before, when, error = self.failed
            if before == stamp and (stamp or time.monotonic() < when + RETRY_SECONDS):
                raise without_traceback(error)
