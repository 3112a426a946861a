"""Rows that decode, in batches by length, so that one long row does not make all others as long.

In a batch, attention reads as many positions for each row as the longest has. Rows of a shorter class join those of a
longer one if the extra positions that they then read cost less than one more step, which reads the model's weights once
more. So there is one batch, unless lengths differ much.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .prefixes import KeysValues
from .request import Request
from .slots import Slots

if TYPE_CHECKING:
    from .runner import Runner

FIRST_LENGTH, FACTOR = 512, 4  # classes of up to 512, 2,048, 8,192, ... positions
# What a step costs besides reading the weights, in bytes of keys and values that could be read meanwhile: about 5 ms of
# calls for 6 layers, at 6 GB/s.
CALL_BYTES = 32 << 20


class Batches:
    """Slots for each class of lengths."""

    def __init__(self, runner: Runner, max_rows: int):
        self._runner, self._max_rows = runner, max_rows
        self.of: list[Slots] = []

    def __len__(self) -> int:
        return sum(len(slots.rows) for slots in self.of)

    def __iter__(self) -> Iterator[Slots]:
        """Yield the batches that have rows."""
        return iter([slots for slots in self.of if slots.rows])

    def add(self, request: Request, keys_values: KeysValues | None) -> None:
        """Give a request a slot. keys_values: of its prompt but the last token, to be copied."""
        self._slots(request.fed).append(request, keys_values, request.fed)

    def arrange(self) -> None:
        """Move rows that outgrew their class, and join batches where one step is cheaper than two."""
        for number, slots in enumerate(self.of):
            for at in range(len(slots.rows) - 1, -1, -1):
                if slots.rows[at].fed >= _limit(number):
                    self._move(slots, at)
        used = list(self)
        for small, big in itertools.pairwise(used):
            if self._joins(small, big):
                while small.rows:
                    self._move(small, len(small.rows) - 1, big)

    def clear(self) -> list[Request]:
        """Drop all rows and buffers. Return the requests."""
        requests = [request for slots in self.of for request in slots.rows]
        self.of.clear()
        return requests

    def _move(self, slots: Slots, at: int, to: Slots | None = None) -> None:
        request = slots.rows[at]
        keys_values = slots.read(at, request.fed) if request.fed else None
        (to or self._slots(request.fed)).append(request, keys_values, request.fed)
        slots.remove(at)

    def _slots(self, length: int) -> Slots:
        number = 0
        while length >= _limit(number):
            number += 1
        while len(self.of) <= number:
            self.of.append(self._runner.slots(self._max_rows))
        return self.of[number]

    def _joins(self, small: Slots, big: Slots) -> bool:
        longest = [max(request.fed for request in slots.rows) for slots in (small, big)]
        extra = len(small.rows) * max(longest[1] - longest[0], 0) * max(small.position_bytes, big.position_bytes)
        return extra < self._runner.bytes + CALL_BYTES


def _limit(number: int) -> int:
    return FIRST_LENGTH * FACTOR**number
