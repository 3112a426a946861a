"""The adapters that are on the device and in memory: how one gets from one to the other, and out of memory.

Only the engine's thread moves them, between two steps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from ...layers.bases import base_of, quantized
from ...model.detach import detach
from ...model.route import expect
from ...model.state import STATE
from . import heap

if TYPE_CHECKING:
    from .entry import Entry
    from .loading import Loader

# Bytes dropped from memory after which the heap is trimmed (see `heap`).
TRIM_EACH = 64 << 20


class Shelves:
    """`device`: attached adapters, `built`: those in memory and not attached, both by key.

    places: the most there may be in `device`; memory_bytes: the most that those in `built` may take.
    """

    def __init__(self, model: nn.Module, places: int, memory_bytes: int):
        self.model, self.places, self.memory_bytes = model, places, memory_bytes
        self.device: dict[str, Entry] = {}
        self.built: dict[str, Entry] = {}
        self._unsettled: dict[str, Entry] = {}  # of `built`: `park` has not looked at them yet
        self.loads = self.evictions = 0
        self._dropped = 0
        self._hold_base()

    @property
    def bytes(self) -> int:
        """The bytes of the adapters in memory."""
        return sum(entry.size for entry in self.built.values())

    @property
    def swaps(self) -> bool:
        """Whether a forward puts parameters of adapters in the place of the base's (modules to save)."""
        return any(entry.prepared is not None and entry.prepared.copies for entry in self.device.values())

    def at_hand(self, entry: Entry) -> bool:
        """Whether an adapter can be attached now."""
        return entry.key in self.built and not entry.moving and entry.prepared is not None and not entry.prepared.parked

    def put(self, entry: Entry) -> None:
        """Take an adapter that was built, or has left the device or an accelerator's memory."""
        self.built[entry.key] = self._unsettled[entry.key] = entry

    def attach(self, entry: Entry) -> None:
        """Attach an adapter that is at hand. Raises what building raises, if that was left to this."""
        assert entry.prepared is not None
        entry.prepared.attach(self.model)
        expect(self.model, self.places, fixed=True)
        self.device[entry.key] = self.built.pop(entry.key)
        self._unsettled.pop(entry.key, None)
        entry.size = entry.prepared.bytes
        self.loads += 1

    def detach(self, entry: Entry) -> None:
        """Detach an adapter. It stays in memory; an accelerator's until `park`."""
        assert entry.prepared is not None
        detach(self.model, entry.key)
        if STATE not in self.model.__dict__:
            self._hold_base()
        self.put(self.device.pop(entry.key))
        entry.prepared.forget_computed()

    def park(self, kept: Collection[str], loader: Loader) -> None:
        """Begin to move what is in an accelerator's memory, and not attached, to ours. None of `kept`."""
        for entry in [entry for key, entry in self._unsettled.items() if key not in kept and not entry.moving]:
            del self._unsettled[entry.key]
            prepared = entry.prepared
            if prepared is not None and not prepared.parked and prepared.on_accelerator:
                entry.moving = True
                loader.park(entry.key, prepared, entry.source.label)

    def drop(self, entry: Entry) -> int:
        """Forget the values of an adapter that is not attached. Return their bytes."""
        if self.built.pop(entry.key, None) is None:
            return 0
        self._unsettled.pop(entry.key, None)
        entry.prepared = None
        self._dropped += entry.size
        return entry.size

    def drop_oldest(self, kept: Collection[str], loader: Loader) -> None:
        """Drop adapters from memory, the least recently used first, until the rest is within its bound. None of `kept`,
        which are about to be attached.
        """
        left = self.bytes
        for entry in sorted(self.built.values(), key=lambda entry: entry.used):
            if left <= self.memory_bytes:
                break
            if entry.key not in kept and not entry.moving:
                left -= self.drop(entry)
        if self._dropped > TRIM_EACH:
            self._dropped = 0
            loader.run(heap.trim)

    def close(self) -> None:
        """Detach everything, and let the base be as it was."""
        for entry in list(self.device.values()):
            self.detach(entry)
        for module in quantized(self.model).values():
            base_of(module).restore(module)

    def _hold_base(self) -> None:
        """Keep quantized weights as they can be adapted: bitsandbytes repacks some in a forward without adapters."""
        for module in quantized(self.model).values():
            base_of(module).prepare(module)
