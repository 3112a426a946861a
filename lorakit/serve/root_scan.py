"""Look for new adapters below the roots: at the start, and when a request names one that is not known.

Anybody can ask for names that are not there, so looks are bounded: one at a time, shared by all who wait for it, not
more often than every SECONDS, and for no more than a tenth of the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence

from . import names
from .locations import Locations
from .threads import in_thread

log = logging.getLogger(__name__)
SECONDS = 0.5  # from the end of one look to the next, at least

FoundAdapter = tuple[str, str, int]  # (name, place, when it was written in seconds since 1970)


class RootScan:
    """Looks, and gives what it sees to `register`, which returns how many of it are new."""

    def __init__(
        self, locations: Locations, base_names: Collection[str], register: Callable[[Sequence[FoundAdapter]], int]
    ):
        """base_names: what requests call the base; no adapter can have these names."""
        self.locations, self.base_names, self.register = locations, base_names, register
        self._allowed = 0.0  # when the next look may begin, by time.monotonic()
        self._looking = asyncio.Lock()
        self._next: asyncio.Task[int] | None = None  # a look that has not begun yet
        self._unnameable: set[str] = set()  # said already

    async def now(self) -> int:
        """Look at once, and return how many adapters are new."""
        async with self._looking:
            begin = time.monotonic()
            found = await in_thread(lambda: list(self.locations.below_roots()), "lorakit-scan")
            end = time.monotonic()
            self._allowed = end + max(SECONDS, 10 * (end - begin))
            self._warn([place for name, place, _ in found if not self._can_be(name)])
            return self.register([one for one in found if self._can_be(one[0])])

    def is_near(self) -> bool:
        """Whether the next look may begin within SECONDS, so that a request can wait for it."""
        return bool(self.locations.roots) and self._allowed <= time.monotonic() + SECONDS

    async def next(self) -> None:
        """Wait for the next look."""
        if self._next is None:
            self._next = asyncio.create_task(self._when_allowed())
        await asyncio.shield(self._next)

    async def _when_allowed(self) -> int:
        await asyncio.sleep(max(self._allowed - time.monotonic(), 0))
        self._next = None  # who comes from here on may ask for what this look has passed
        return await self.now()

    def _can_be(self, name: str) -> bool:
        return names.is_name(name) and name not in self.base_names

    def _warn(self, places: Sequence[str]) -> None:
        new = [place for place in places if place not in self._unnameable]
        self._unnameable.update(new)
        if new:
            log.warning("%s", names.skipped(new))
