"""A request on its way through the engine's thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine import Choice, Work
    from ..ticket import Ticket


@dataclass(eq=False)
class Request:
    """One answer. `ids`: prompt and answer; the last of them is not fed yet, all others are, once it has a row."""

    work: Work
    choice: Choice  # each key once, in a fixed order
    matcher: Any = None  # of its grammar
    ticket: Ticket = field(init=False)
    ids: list[int] = field(init=False)
    picking: Any = field(init=False, default=None)
    compiling: asyncio.Task[None] | None = None  # its grammar; of the event loop
    cancelled: bool = False  # set by the event loop's thread
    cached: int = 0  # tokens of the prompt that were not computed again
    admitted: float = 0.0  # when it got a row, on time.monotonic()'s clock

    def __post_init__(self) -> None:
        self.ids = list(self.work.ids)

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapters that it uses."""
        return tuple(key for key, _ in self.choice)

    @property
    def fed(self) -> int:
        """The number of tokens that are fed before the next step: all but the last."""
        return len(self.ids) - 1

    @property
    def prompt(self) -> int:
        """The number of tokens of its prompt."""
        return len(self.work.ids)
