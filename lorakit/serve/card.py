"""What the server knows of an adapter: what `/v1/models` shows, and what its prompts need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..data.chat_record import ChatRecord
from .engine import Choice

if TYPE_CHECKING:
    from .sources import ReadAdapter

# registered: known by name, not read yet · ready: the engine has it · failed: `problem` says why
Status = Literal["registered", "ready", "failed"]


@dataclass
class Card:
    """One public name. `key`: the hash of the contents behind it, None until they are read."""

    name: str
    place: str  # where it was asked for: relative to its root, or a hub id; of a path on the command line its last part
    created: int  # seconds since 1970
    key: str | None = None
    status: Status = "registered"
    pinned: bool = False
    size: int = 0  # bytes of its files
    rank: int = 0
    running: int = 0  # requests that use it now
    chat: ChatRecord = field(default_factory=ChatRecord)  # its template and stop tokens
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def ready(self, read: ReadAdapter) -> Card:
        """Return the card with what was read of the adapter."""
        metadata = read.adapter.metadata
        return replace(
            self,
            key=read.key,
            status="ready",
            size=read.size,
            rank=read.adapter.rank,
            chat=ChatRecord.of(metadata),
            metadata={name: value for name, value in metadata.items() if name != "header"},
            problem=None,
        )

    @property
    def version(self) -> str:
        """The name with the beginning of the content's hash, for logs and headers: sql@3fa9c1."""
        return self.name if self.key is None else f"{self.name}@{self.key[:6]}"


@dataclass(frozen=True)
class Leased:
    """The adapters that a request holds until it is done. `cards`: by weight, heaviest first; empty for the base."""

    model: str  # as asked for, to be repeated in the answer
    choice: Choice
    cards: tuple[Card, ...] = ()

    @property
    def leading(self) -> Card | None:
        """The adapter whose template and stop tokens count: the one with the largest weight."""
        return self.cards[0] if self.cards else None
