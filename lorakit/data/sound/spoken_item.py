"""A sound with its transcript as training sees it.

    decoder in   <sot> <en> <transcribe> <notimestamps> t₁ t₂ … tₙ         labels   – – – t₁ t₂ … tₙ <end>

The tokens before the text are given, not learned: a base that knows its languages would be told them in use too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..parse import Row
from .rows import SoundFile


@dataclass(frozen=True)
class SpokenItem:
    """`start`: the ids that the decoder starts from; `ids`: of the text with its end token, empty for a sound to
    predict; `text`: what is said, None likewise.
    """

    sound: SoundFile
    start: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None
    row: Row

    @property
    def size(self) -> int:
        """Its tokens; all sounds cost the same, as the base hears each padded to its full length."""
        return len(self.start) + len(self.ids)

    @property
    def weight(self) -> int:
        """Its trained tokens."""
        return len(self.ids)

    @property
    def where(self) -> str:
        return self.sound.where

    @property
    def group(self) -> None:
        """Any rows can share a batch."""

    @property
    def split_key(self) -> str:
        """Rows of one sound are held out together."""
        return self.sound.content

    def digest(self) -> bytes:
        """Sound, start and ids."""
        numbers = np.asarray([len(self.start), *self.start, *self.ids], dtype="<i8").tobytes()
        return hashlib.sha256(self.sound.content.encode() + numbers).digest()
