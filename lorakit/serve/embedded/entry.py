"""What the tiers know of one adapter."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import AdapterError
from ..engine import Source

if TYPE_CHECKING:
    from ...model.prepared import Prepared


@dataclass(eq=False)
class Entry:
    """An adapter that was loaded, or is being loaded. `prepared`: None while it is on disk."""

    key: str
    source: Source
    prepared: Prepared | None = None
    size: int = 0  # bytes of its tensors, known once it was prepared
    is_new: bool = True  # it was never in memory
    moving: bool = False  # it is being read and prepared
    claims: int = 0  # requests that are not over
    users: int = 0  # rows that use it
    used: int = 0  # when it was used last, as a count of uses
    problem: AdapterError | None = None  # why it could not be read again
    problem_at: int = 0  # the pass in which that was found
    loaded: Future[None] = field(default_factory=Future)  # done when it is read and checked
    placed: Future[None] | None = None  # of a pin: done when it is attached
    unloaded: Future[int] | None = None  # of `unload`: the bytes freed

    @property
    def is_free(self) -> bool:
        """Whether nothing holds it."""
        return not (self.claims or self.users or self.moving)

    def fail(self, error: Exception) -> None:
        """End the waits of those who load or unload it."""
        for future in (self.loaded, self.placed, self.unloaded):
            if future is not None and not future.done():
                future.set_exception(error)

    def end_wait_for_place(self) -> None:
        """Let those go on who wait for the place of a pin."""
        if self.placed is not None:
            if not self.placed.done():
                self.placed.set_result(None)
            self.placed = None
