"""Keys and values of the rows of a batch, each with a length of its own: per layer [rows, heads, positions, head_dim].

A row's tokens stand at the left of its slot, so that a row which comes or goes moves no other: the last row takes a
slot that becomes free. Positions behind a row's length hold what was there before. They are masked, and finite, as a
masked NaN would reach the output (0 · NaN); see `clear_row`. Layers with a sliding window keep all positions too: the
mask says what they may see, and a prompt's start can be kept for others at any length.

Buffers grow on demand, in steps of doubled rows and positions, and are given back when the last row has left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .prefixes import KeysValues

if TYPE_CHECKING:
    from .request import Request

FIRST_ROWS, FIRST_POSITIONS = 4, 128


class Slots:
    """The rows of a batch and their caches.

    rows: the requests, in the order of the slots. lengths: the positions that each has.
    """

    def __init__(self, layers: int, max_rows: int, max_positions: int):
        self.rows: list[Request] = []
        self.max_rows, self.max_positions = max_rows, max_positions
        self.lengths: list[int] = []  # without the tokens that are fed now
        self.width = 0  # tokens that are fed now, for each row
        self._index: tuple[Tensor, Tensor] | None = None
        self.layers = [SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))

    @property
    def longest(self) -> int:
        """The most positions that any row has after the tokens that are fed now."""
        return min(max(self.lengths, default=0) + self.width, self.max_positions)

    @property
    def aligned(self) -> bool:
        """Whether the tokens that are fed now stand at the same positions in all rows."""
        return len(set(self.lengths)) <= 1

    @property
    def position_bytes(self) -> int:
        """The bytes of a row's keys and values at one position; 0 before the first row was computed."""
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in self._allocated())

    def begin(self, width: int) -> None:
        """Prepare to feed `width` tokens to each row."""
        self.width, self._index = width, None

    def end(self) -> None:
        """Count the tokens that were fed as each row's own."""
        self.lengths = [length + self.width for length in self.lengths]
        self.width = 0

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows [rows, 1] and positions [rows, width] that the tokens that are fed now go to."""
        if self._index is None:
            starts = torch.tensor(self.lengths, device=device)[:, None]
            rows = torch.arange(len(self.lengths), device=device)[:, None]
            positions = starts + torch.arange(self.width, device=device)
            # Padding behind a row that ends near the context's end goes to the last position, which no prompt fills.
            self._index = rows, positions.clamp_(max=self.max_positions - 1)
        return self._index

    def append(self, request: Request, keys_values: KeysValues | None, length: int) -> None:
        """Add a row of `length` positions, copied from `keys_values`, which may have more. None: it has none yet."""
        at = len(self.rows)
        if keys_values is not None and length:
            for layer, (keys, values) in zip(self.layers, keys_values, strict=True):
                layer.fit(keys[None], values[None], at + 1, length)
                layer.buffers[0][at, :, :length] = keys[:, :length]
                layer.buffers[1][at, :, :length] = values[:, :length]
        self.rows.append(request)  # last, as memory may be short above
        self.lengths.append(length)

    def read(self, at: int, length: int) -> KeysValues:
        """Return the first positions of a row, for each layer: views, until the next step writes into them."""
        return [(keys[at, :, :length], values[at, :, :length]) for keys, values in (x.buffers for x in self.layers)]

    def remove(self, at: int) -> None:
        """Drop a row. The last row takes its slot.

        Its values stay where they are, so they must be finite: a row in which a step left NaN is dropped in the same
        pass, after `clear_row`, see `Loop._took`.
        """
        last = len(self.rows) - 1
        request, length = self.rows.pop(), self.lengths.pop()
        if at < last:
            self.rows[at], self.lengths[at] = request, length
            for buffer in self._allocated() if length else ():  # a row without positions may lie beyond the buffers
                buffer[at, :, :length] = buffer[last, :, :length]
        if not self.rows:
            self.shrink()

    def clear_row(self, at: int) -> None:
        """Overwrite a row whose values are not finite with zeros."""
        for buffer in self._allocated():
            buffer[at] = 0

    def shrink(self) -> None:
        """Give the buffers back if they have grown. There must be no rows."""
        if any(buffer.shape[2] > FIRST_POSITIONS for buffer in self._allocated()):
            self.reset()

    def reset(self) -> None:
        """Drop all rows and buffers."""
        self.rows.clear()
        self.lengths.clear()
        for layer in self.layers:
            layer.buffers = ()
            layer.is_initialized = False

    def _allocated(self) -> list[Tensor]:
        return [buffer for layer in self.layers for buffer in layer.buffers]


class SlotLayer(CacheLayerMixin):
    """One layer of `Slots`, as transformers' attention sees it. buffers: keys and values, () before the first."""

    is_sliding = False

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots = slots
        self.buffers: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all rows, as `fit` does."""
        self.fit(key_states, value_states, len(key_states), self.slots.longest)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values, [rows, heads, width, head_dim], and return those of all positions up to the longest.

        Rows that start now get back what they gave: there is nothing before it.
        """
        slots = self.slots
        rows, end = len(key_states), slots.longest
        self.fit(key_states, value_states, rows, end)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            if slots.aligned:
                buffer[:rows, :, slots.lengths[0] : end] = new
            else:
                at, positions = slots.index(new.device)
                buffer[at, :, positions] = new.transpose(1, 2)  # [rows, width, heads, head_dim]
        if end == slots.width:
            return key_states, value_states
        keys, values = (buffer[:rows, :, :end] for buffer in self.buffers)
        return keys, values

    def fit(self, keys: Tensor, values: Tensor, rows: int, positions: int) -> None:
        """Make sure that there is room for `rows` and `positions`. keys, values: of the right heads and sizes."""
        if self.buffers and rows <= self.buffers[0].shape[0] and positions <= self.buffers[0].shape[2]:
            return
        old = self.buffers
        rows, positions = max(rows, len(old[0]) if old else 0), max(positions, old[0].shape[2] if old else 0)
        rows = min(_doubled(FIRST_ROWS, rows), max(self.slots.max_rows, rows))
        positions = min(_doubled(FIRST_POSITIONS, positions), max(self.slots.max_positions, positions))
        # Zeros, not empty: masked positions must be finite. A CPU allocates memory that was never written to lazily.
        self.buffers = tuple(new.new_zeros(rows, new.shape[1], positions, new.shape[3]) for new in (keys, values))
        self.is_initialized = True
        for at, length in enumerate(self.slots.lengths[: len(old[0]) if old else 0]):
            for buffer, before in zip(self.buffers, old, strict=True):
                buffer[at, :, :length] = before[at, :, :length]

    def get_seq_length(self) -> int:
        """Return the positions before the tokens that are fed now, of the longest row."""
        return max(self.slots.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions the keys of this step have, and the first one's: 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1


def _doubled(size: int, least: int) -> int:
    while size < least:
        size *= 2
    return size
